/* Kernels of the decoder in bfloat16 for processors with AVX512-BF16. native.py compiles and calls them, and says why.
   All tensors are dense unless a stride is given; sums are in float32. */
#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

typedef uint16_t bf16;

static inline __m512 load(const bf16 *p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16));
}
static inline void store(bf16 *p, __m512 x) { _mm256_storeu_si256((__m256i *)p, (__m256i)_mm512_cvtneps_pbh(x)); }

/* Cephes' expf, for x <= 88; 0 below -87. */
static inline __m512 exp512(__m512 x) {
    __mmask16 tiny = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-87.0f), _CMP_LT_OQ);
    __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504088896341f)), 0);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    __m512 p = _mm512_set1_ps(1.9875691500e-4f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.3981999507e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.3334519073e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1665795894e-2f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666665459e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.0000001201e-1f));
    p = _mm512_fmadd_ps(p, _mm512_mul_ps(r, r), _mm512_add_ps(r, _mm512_set1_ps(1.0f)));
    return _mm512_mask_mov_ps(_mm512_scalef_ps(p, n), tiny, _mm512_setzero_ps());
}

/* out[i] = x[i] / sqrt(mean(x[i]^2) + eps) * weight; x, out [rows, n], weight float [n], n a multiple of 16. */
void rms_norm(const bf16 *x, const float *weight, bf16 *out, int64_t rows, int64_t n, float eps) {
    for (int64_t i = 0; i < rows; i++, x += n, out += n) {
        __m512 sum = _mm512_setzero_ps();
        for (int64_t j = 0; j < n; j += 16) {
            __m512 v = load(x + j);
            sum = _mm512_fmadd_ps(v, v, sum);
        }
        __m512 scale = _mm512_set1_ps(1.0f / sqrtf(_mm512_reduce_add_ps(sum) / n + eps));
        for (int64_t j = 0; j < n; j += 16)
            store(out + j, _mm512_mul_ps(_mm512_mul_ps(load(x + j), scale), _mm512_loadu_ps(weight + j)));
    }
}

/* out = silu(x[:, :n]) * x[:, n:]; x [rows, 2n], out [rows, n], n a multiple of 16. */
void silu_mul(const bf16 *x, bf16 *out, int64_t rows, int64_t n) {
    for (int64_t i = 0; i < rows; i++, x += 2 * n, out += n)
        for (int64_t j = 0; j < n; j += 16) {
            __m512 g = load(x + j), e = exp512(_mm512_sub_ps(_mm512_setzero_ps(), g));
            __m512 s = _mm512_div_ps(g, _mm512_add_ps(_mm512_set1_ps(1.0f), e));
            store(out + j, _mm512_mul_ps(s, load(x + n + j)));
        }
}

/* For each row of qkv [rows, (heads + 2 kv_heads) * dim]: norms the heads of q and k (unless the weights, float [dim],
   are null), rotates them in place by cos, sin float [rows, dim / 2], and writes k and v to row slots[i] of the pool.
   dim is a multiple of 32. */
void rotate_and_write(bf16 *qkv, const float *q_norm, const float *k_norm, float eps, const float *cos, const float *sin,
                      bf16 *k_pool, bf16 *v_pool, const int64_t *slots, int64_t rows, int64_t heads, int64_t kv_heads,
                      int64_t dim) {
    int64_t half = dim / 2, kv = kv_heads * dim;
    for (int64_t i = 0; i < rows; i++, cos += half, sin += half, qkv += (heads + 2 * kv_heads) * dim) {
        for (int64_t h = 0; h < heads + kv_heads; h++) {
            const float *weight = h < heads ? q_norm : k_norm;
            if (weight) rms_norm(qkv + h * dim, weight, qkv + h * dim, 1, dim, eps);
            for (int64_t j = 0; j < half; j += 16) {
                bf16 *p = qkv + h * dim + j;
                __m512 a = load(p), b = load(p + half), c = _mm512_loadu_ps(cos + j), s = _mm512_loadu_ps(sin + j);
                store(p, _mm512_fmsub_ps(a, c, _mm512_mul_ps(b, s)));
                store(p + half, _mm512_fmadd_ps(b, c, _mm512_mul_ps(a, s)));
            }
        }
        memcpy(k_pool + slots[i] * kv, qkv + heads * dim, kv * sizeof(bf16));
        memcpy(v_pool + slots[i] * kv, qkv + heads * dim + kv, kv * sizeof(bf16));
    }
}

#define GROUP 4 /* query heads handled together, so that a key is loaded once for them */

/* G query heads of one KV head attend to keys [first, last) of the pages in `table`. Inlined for each G and D, so that
   the accumulators stay in registers. */
static inline __attribute__((always_inline)) void attend_group(
    const bf16 *q, const bf16 *k_pool, const bf16 *v_pool, const int64_t *table, int64_t first, int64_t last, bf16 *out,
    float *scores, int64_t pad, float scale, int64_t block, int64_t row, const int G, const int D) {
    __m512bh query[GROUP][4];
    for (int g = 0; g < G; g++)
        for (int c = 0; c < D / 32; c++) query[g][c] = (__m512bh)_mm512_loadu_si512(q + g * D + c * 32);
    float top[GROUP];
    for (int g = 0; g < G; g++) top[g] = -INFINITY;
    for (int64_t t = first; t < last;) {
        const bf16 *k = k_pool + (table[t / block] * block + t % block) * row;
        int64_t stop = t - t % block + block < last ? t - t % block + block : last;
        for (; t < stop; t++, k += row) {
            __m512 dot[GROUP];
            for (int g = 0; g < G; g++) dot[g] = _mm512_setzero_ps();
            for (int c = 0; c < D / 32; c++) {
                __m512bh key = (__m512bh)_mm512_loadu_si512(k + c * 32);
                for (int g = 0; g < G; g++) dot[g] = _mm512_dpbf16_ps(dot[g], query[g][c], key);
            }
            for (int g = 0; g < G; g++) {
                float s = _mm512_reduce_add_ps(dot[g]) * scale;
                scores[g * pad + t - first] = s;
                top[g] = s > top[g] ? s : top[g];
            }
        }
    }
    int64_t n = last - first;
    float inverse[GROUP];
    for (int g = 0; g < G; g++) {
        __m512 sum = _mm512_setzero_ps(), high = _mm512_set1_ps(top[g]);
        for (int64_t i = n; i < pad; i++) scores[g * pad + i] = -INFINITY;
        for (int64_t i = 0; i < pad; i += 16) {
            __m512 e = exp512(_mm512_sub_ps(_mm512_loadu_ps(scores + g * pad + i), high));
            sum = _mm512_add_ps(sum, e);
            _mm512_storeu_ps(scores + g * pad + i, e);
        }
        inverse[g] = 1.0f / _mm512_reduce_add_ps(sum);
    }
    __m512 acc[GROUP][8];
    for (int g = 0; g < G; g++)
        for (int c = 0; c < D / 16; c++) acc[g][c] = _mm512_setzero_ps();
    for (int64_t t = first; t < last;) {
        const bf16 *v = v_pool + (table[t / block] * block + t % block) * row;
        int64_t stop = t - t % block + block < last ? t - t % block + block : last;
        for (; t < stop; t++, v += row)
            for (int c = 0; c < D / 16; c++) {
                __m512 value = load(v + c * 16);
                for (int g = 0; g < G; g++)
                    acc[g][c] = _mm512_fmadd_ps(_mm512_set1_ps(scores[g * pad + t - first]), value, acc[g][c]);
            }
    }
    for (int g = 0; g < G; g++)
        for (int c = 0; c < D / 16; c++) store(out + g * D + c * 16, _mm512_mul_ps(acc[g][c], _mm512_set1_ps(inverse[g])));
}

#define CALL(G, D) attend_group(query, keys, values, table, first, last, result, scores, pad, scale, block, row, G, D)
#define CALLS(D) \
    do { \
        if (some == 1) CALL(1, D); \
        else if (some == 2) CALL(2, D); \
        else if (some == 3) CALL(3, D); \
        else CALL(4, D); \
    } while (0)

/* One query row per request attends to the request's pages. q rows are q_stride apart; out [requests, heads * dim];
   tables [requests, width]; lengths count the row itself; scores has room for GROUP * (longest + 16) floats;
   window <= 0: none; dim is 32, 64, 96 or 128. */
void paged_decode(const bf16 *q, int64_t q_stride, const bf16 *k_pool, const bf16 *v_pool, const int64_t *tables,
                  int64_t width, const int64_t *lengths, bf16 *out, float *scores, int64_t requests, int64_t heads,
                  int64_t kv_heads, int64_t dim, int64_t block, int64_t window, float scale) {
    int64_t group = heads / kv_heads, row = kv_heads * dim;
    for (int64_t i = 0; i < requests; i++) {
        const int64_t *table = tables + i * width;
        int64_t last = lengths[i], first = window > 0 && last > window ? last - window : 0;
        int64_t pad = (last - first + 15) / 16 * 16;
        for (int64_t h = 0; h < kv_heads; h++)
            for (int64_t g = 0; g < group; g += GROUP) {
                int64_t head = h * group + g, some = group - g < GROUP ? group - g : GROUP;
                const bf16 *query = q + i * q_stride + head * dim, *keys = k_pool + h * dim, *values = v_pool + h * dim;
                bf16 *result = out + (i * heads + head) * dim;
                if (dim == 32) CALLS(32);
                else if (dim == 64) CALLS(64);
                else if (dim == 96) CALLS(96);
                else CALLS(128);
            }
    }
}
