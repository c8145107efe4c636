/* Kernels of the decoder on a CPU, for one type of elements: bfloat16 where BFLOAT16 is defined, else float.
   native.py compiles and calls them, and says why. All tensors are dense unless a stride is given.

   A row's result has the same bits whatever other rows there are: each row goes through the same operations in the same
   order, and products are fused with sums only where `fma` or `multiply_add` says so. */
#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef __AVX2__
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))
#define LEAST(a, b) ((a) < (b) ? (a) : (b))
#define MOST(a, b) ((a) > (b) ? (a) : (b))

/* ---- Vectors of W floats ---- */

#if defined(__AVX512F__)
#define W 16
#elif defined(__AVX2__)
#define W 8
#else
#define W 4
#endif
typedef float vec __attribute__((vector_size(4 * W)));
typedef int32_t ivec __attribute__((vector_size(4 * W)));
typedef uint32_t uvec __attribute__((vector_size(4 * W)));
typedef uint16_t halves __attribute__((vector_size(2 * W)));

#if defined(__AVX512F__)
INLINE vec splat(float x) { return _mm512_set1_ps(x); }
INLINE vec fma_(vec a, vec b, vec c) { return _mm512_fmadd_ps(a, b, c); }
INLINE vec higher(vec a, vec b) { return _mm512_max_ps(a, b); }
INLINE float sum_of(vec x) { return _mm512_reduce_add_ps(x); }
INLINE float highest_of(vec x) { return _mm512_reduce_max_ps(x); }
#else
#if defined(__AVX2__) && defined(__FMA__)
INLINE vec splat(float x) { return _mm256_set1_ps(x); }
INLINE vec fma_(vec a, vec b, vec c) { return _mm256_fmadd_ps(a, b, c); }
INLINE vec higher(vec a, vec b) { return _mm256_max_ps(a, b); }
#else
INLINE vec splat(float x) { return x - (vec){0}; }
INLINE vec higher(vec a, vec b) {
    ivec more = a > b;
    return (vec)((more & (ivec)a) | (~more & (ivec)b));
}
#ifdef __FP_FAST_FMAF
INLINE vec fma_(vec a, vec b, vec c) {
    for (int i = 0; i < W; i++) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
    return c;
}
#else
INLINE vec fma_(vec a, vec b, vec c) { return a * b + c; }
#endif
#endif
INLINE float sum_of(vec x) {
    for (int half = W / 2; half; half /= 2)
        for (int i = 0; i < half; i++) x[i] += x[i + half];
    return x[0];
}
INLINE float highest_of(vec x) {
    for (int half = W / 2; half; half /= 2)
        for (int i = 0; i < half; i++) x[i] = MOST(x[i], x[i + half]);
    return x[0];
}
#endif

INLINE vec load(const void *p) {
    vec x;
    memcpy(&x, p, sizeof x);
    return x;
}
INLINE void store(void *p, vec x) { memcpy(p, &x, sizeof x); }
INLINE vec where(ivec yes, vec a, vec b) { return (vec)((yes & (ivec)a) | (~yes & (ivec)b)); }

/* Cephes' expf, for x <= 88; 0 below -87. */
INLINE vec exp_(vec x) {
    vec big = splat(12582912.0f), shifted = fma_(x, splat(1.44269504088896341f), big), n = shifted - big;
    vec r = fma_(n, splat(2.12194440e-4f), fma_(n, splat(-0.693359375f), x)), p = splat(1.9875691500e-4f);
    p = fma_(p, r, splat(1.3981999507e-3f));
    p = fma_(p, r, splat(8.3334519073e-3f));
    p = fma_(p, r, splat(4.1665795894e-2f));
    p = fma_(p, r, splat(1.6666665459e-1f));
    p = fma_(p, r, splat(5.0000001201e-1f));
    p = fma_(p, r * r, r + splat(1.0f));
    ivec power = ((ivec)shifted - (ivec)big + 127) << 23;
    return (vec)((ivec)(p * (vec)power) & ~(x < splat(-87.0f)));
}

/* ---- Elements ---- */

#ifdef BFLOAT16
typedef uint16_t element;
INLINE float number(element x) {
    uint32_t bits = (uint32_t)x << 16;
    float result;
    memcpy(&result, &bits, 4);
    return result;
}
INLINE element rounded(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return x != x ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
INLINE vec numbers(const element *p) {
    halves x;
    memcpy(&x, p, sizeof x);
    return (vec)(__builtin_convertvector(x, uvec) << 16);
}
INLINE void write(element *p, vec x) {
#ifdef __AVX512BF16__
    _mm256_storeu_si256((__m256i *)p, (__m256i)_mm512_cvtneps_pbh(x));
#else
    uvec bits = (uvec)x, near = bits + 0x7fff + (bits >> 16 & 1);
    ivec nan = x != x;
    halves y = __builtin_convertvector((((uvec)nan & 0x7fc00000) | (~(uvec)nan & near)) >> 16, halves);
    memcpy(p, &y, sizeof y);
#endif
}
#else
typedef float element;
INLINE float number(element x) { return x; }
INLINE element rounded(float x) { return x; }
INLINE vec numbers(const element *p) { return load(p); }
INLINE void write(element *p, vec x) { store(p, x); }
#endif

/* Whether all n values are finite numbers: no exponent is all ones. */
static int64_t is_finite(const element *x, int64_t n) {
#ifdef BFLOAT16
    uint16_t bits, exponent = 0x7f80, bad = 0;
#else
    uint32_t bits, exponent = 0x7f800000, bad = 0;
#endif
    for (int64_t i = 0; i < n; i++) {
        memcpy(&bits, x + i, sizeof bits);
        bad |= (bits & exponent) == exponent;
    }
    return !bad;
}

/* ---- Row by row ---- */

/* out[i] = x[i] / sqrt(mean(x[i]^2) + eps) * weight; x, out [rows, n], weight float [n], n a multiple of 16. */
void rms_norm(const element *x, const float *weight, element *out, int64_t rows, int64_t n, float eps) {
    for (int64_t i = 0; i < rows; i++, x += n, out += n) {
        vec sum = splat(0);
        for (int64_t j = 0; j < n; j += W) {
            vec v = numbers(x + j);
            sum = fma_(v, v, sum);
        }
        vec scale = splat(1.0f / sqrtf(sum_of(sum) / n + eps));
        for (int64_t j = 0; j < n; j += W) write(out + j, numbers(x + j) * scale * load(weight + j));
    }
}

/* out = silu(x[:, :n]) * x[:, n:]; x [rows, 2n], out [rows, n], n a multiple of 16. */
void silu_mul(const element *x, element *out, int64_t rows, int64_t n) {
    for (int64_t i = 0; i < rows; i++, x += 2 * n, out += n)
        for (int64_t j = 0; j < n; j += W) {
            vec gate = numbers(x + j), most = splat(88.0f), negative = splat(0) - gate;
            vec e = exp_(where(negative > most, most, negative));
            write(out + j, gate / (splat(1.0f) + e) * numbers(x + n + j));
        }
}

/* For each row of qkv [rows, (heads + 2 kv_heads) * dim]: norms the heads of q and k (unless the weights, float [dim],
   are null), rotates them in place by cos, sin float [rows, dim / 2], and writes k and v to row slots[i] of the pool.
   dim is a multiple of 16. Returns whether all that was written is finite. */
int64_t rotate_and_write(element *qkv, const float *q_norm, const float *k_norm, float eps, const float *cos,
                      const float *sin, element *k_pool, element *v_pool, const int64_t *slots, int64_t rows,
                      int64_t heads, int64_t kv_heads, int64_t dim) {
    int64_t half = dim / 2, kv = kv_heads * dim, all = 1;
    for (int64_t i = 0; i < rows; i++, cos += half, sin += half, qkv += (heads + 2 * kv_heads) * dim) {
        for (int64_t h = 0; h < heads + kv_heads; h++) {
            const float *weight = h < heads ? q_norm : k_norm;
            element *p = qkv + h * dim;
            if (weight) rms_norm(p, weight, p, 1, dim, eps);
            int64_t j = 0;
            for (; j + W <= half; j += W) {
                vec a = numbers(p + j), b = numbers(p + half + j), c = load(cos + j), s = load(sin + j);
                write(p + j, a * c - b * s);
                write(p + half + j, b * c + a * s);
            }
            for (; j < half; j++) {
                float a = number(p[j]), b = number(p[half + j]);
                p[j] = rounded(a * cos[j] - b * sin[j]);
                p[half + j] = rounded(b * cos[j] + a * sin[j]);
            }
        }
        memcpy(k_pool + slots[i] * kv, qkv + heads * dim, kv * sizeof(element));
        memcpy(v_pool + slots[i] * kv, qkv + heads * dim + kv, kv * sizeof(element));
        all &= is_finite(qkv + heads * dim, 2 * kv);
    }
    return all;
}

/* ---- Products of small matrices ---- */

/* A term is what one step adds to a sum: one product of floats or, where the processor has an instruction for it, two
   neighbouring products of bfloat16. */
#if defined(BFLOAT16) && defined(__AVX512BF16__)
#define PER_TERM 2
typedef uint32_t term;
INLINE vec multiply_add(vec sum, term a, vec b) {
    return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_set1_epi32(a), (__m512bh)b);
}
INLINE vec terms(const element *p) { return load(p); }
INLINE void write_weights(term *p, int64_t i, vec x) { write((element *)p + i, x); }
#else
#define PER_TERM 1
typedef float term;
INLINE vec multiply_add(vec sum, term a, vec b) { return fma_(splat(a), b, sum); }
INLINE vec terms(const element *p) { return numbers(p); }
INLINE void write_weights(term *p, int64_t i, vec x) { store(p + i, x); }
#endif

#define ROWS 6 /* and this many columns of vectors are summed in registers */
#define COLUMNS (W == 16 ? 4 : 2)

/* c[r] = c[r] * factor[r] (0 where factor is null) + sum over s < steps of a[r][s] * b[s], for R rows and C vectors. */
INLINE void product_of(const term *a, int64_t a_stride, const term *b, int64_t b_stride, int64_t steps, float *c,
                       int64_t c_stride, const float *factor, const int R, const int C) {
    vec sum[ROWS][4];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int j = 0; j < C; j++)
            sum[r][j] = factor ? load(c + r * c_stride + j * W) * splat(factor[r]) : splat(0);
    for (int64_t s = 0; s < steps; s++) {
        vec x[4];
#pragma GCC unroll 4
        for (int j = 0; j < C; j++) x[j] = load(b + s * b_stride + j * W);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++)
#pragma GCC unroll 4
            for (int j = 0; j < C; j++) sum[r][j] = multiply_add(sum[r][j], a[r * a_stride + s], x[j]);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int j = 0; j < C; j++) store(c + r * c_stride + j * W, sum[r][j]);
}

/* The same for up to ROWS rows and any number of columns that is a multiple of W. */
#define PRODUCT(R, C) product_of(a, a_stride, b + j, b_stride, steps, c + j, c_stride, factor, R, C)
#define PRODUCTS(C) \
    switch (rows) { \
        case 1: PRODUCT(1, C); break; \
        case 2: PRODUCT(2, C); break; \
        case 3: PRODUCT(3, C); break; \
        case 4: PRODUCT(4, C); break; \
        case 5: PRODUCT(5, C); break; \
        default: PRODUCT(6, C); \
    }
INLINE void product(int64_t rows, int64_t columns, const term *a, int64_t a_stride, const term *b, int64_t b_stride,
                    int64_t steps, float *c, int64_t c_stride, const float *factor) {
    int64_t j = 0;
    for (; j + COLUMNS * W <= columns; j += COLUMNS * W) PRODUCTS(COLUMNS)
    for (; j + 2 * W <= columns; j += 2 * W) PRODUCTS(2)
    for (; j < columns; j += W) PRODUCTS(1)
}
static void product_from_zero(int64_t rows, int64_t columns, const term *a, int64_t a_stride, const term *b,
                              int64_t b_stride, int64_t steps, float *c, int64_t c_stride) {
    product(rows, columns, a, a_stride, b, b_stride, steps, c, c_stride, 0);
}
static void product_added(int64_t rows, int64_t columns, const term *a, int64_t a_stride, const term *b,
                          int64_t b_stride, int64_t steps, float *c, int64_t c_stride, const float *factor) {
    product(rows, columns, a, a_stride, b, b_stride, steps, c, c_stride, factor);
}

/* ---- Attention ---- */

/* Keys are taken in tiles of KEYS, counted from the first of the request: which tiles a row goes through, and what it
   does with each, depends on its own position only (softmax as a running maximum and sum: Milakov and Gimelshein, 2018).
   A tile is packed once for a block of rows: keys lie across the lanes. What a row must not see gets the weight 0. */
#define KEYS 64
#define BLOCK 128 /* rows */
#define MOST_DIM 256

/* The KV of one request and KV head. */
typedef struct {
    const element *k, *v;
    const int64_t *table; /* blocks in order */
    int64_t block, row;   /* keys in a block; elements from a key to the next */
    int64_t dim, window;  /* <= 0: none */
    float scale;
} source;

/* Rows of one request that share a KV head, in ascending order of their positions, and what they have seen so far. */
typedef struct {
    int64_t count;
    int64_t position[BLOCK];
    float top[BLOCK];
    _Alignas(64) float total[BLOCK][W]; /* by lane */
    _Alignas(64) term query[BLOCK * MOST_DIM / PER_TERM];
    _Alignas(64) float out[BLOCK * MOST_DIM];
} rows_state;

typedef struct {
    _Alignas(64) term keys[MOST_DIM / PER_TERM * KEYS];   /* [dim, KEYS] */
    _Alignas(64) term values[KEYS / PER_TERM * MOST_DIM]; /* [KEYS, dim] */
} tile;

static _Thread_local rows_state state;
static _Thread_local tile packed;
static const element nothing[MOST_DIM];

INLINE int64_t first_key(const source *s, int64_t position) {
    return s->window > 0 && position >= s->window ? position - s->window + 1 : 0;
}

#if W == 16
/* W rows of W terms to W columns. */
INLINE void transpose(vec *x) {
    __m512 y[16];
    for (int i = 0; i < 16; i += 2) {
        y[i] = _mm512_unpacklo_ps(x[i], x[i + 1]);
        y[i + 1] = _mm512_unpackhi_ps(x[i], x[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; j++) {
            __m512d a = _mm512_castps_pd(y[i + j]), b = _mm512_castps_pd(y[i + j + 2]);
            x[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
            x[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
        }
    for (int i = 0; i < 4; i++) {
        y[i] = _mm512_shuffle_f32x4(x[i], x[i + 4], 0x88);
        y[i + 4] = _mm512_shuffle_f32x4(x[i], x[i + 4], 0xdd);
        y[i + 8] = _mm512_shuffle_f32x4(x[i + 8], x[i + 12], 0x88);
        y[i + 12] = _mm512_shuffle_f32x4(x[i + 8], x[i + 12], 0xdd);
    }
    for (int i = 0; i < 8; i++) {
        x[i] = _mm512_shuffle_f32x4(y[i], y[i + 8], 0x88);
        x[i + 8] = _mm512_shuffle_f32x4(y[i], y[i + 8], 0xdd);
    }
}
#elif W == 8
INLINE void transpose(vec *x) {
    __m256 y[8];
    for (int i = 0; i < 8; i += 2) {
        y[i] = _mm256_unpacklo_ps(x[i], x[i + 1]);
        y[i + 1] = _mm256_unpackhi_ps(x[i], x[i + 1]);
    }
    for (int i = 0; i < 8; i += 4)
        for (int j = 0; j < 2; j++) {
            x[i + 2 * j] = _mm256_shuffle_ps(y[i + j], y[i + j + 2], 0x44);
            x[i + 2 * j + 1] = _mm256_shuffle_ps(y[i + j], y[i + j + 2], 0xee);
        }
    for (int i = 0; i < 4; i++) {
        y[i] = _mm256_permute2f128_ps(x[i], x[i + 4], 0x20);
        y[i + 4] = _mm256_permute2f128_ps(x[i], x[i + 4], 0x31);
    }
    memcpy(x, y, sizeof y);
}
#else
INLINE void transpose(vec *x) {
    for (int i = 0; i < W; i++)
        for (int j = 0; j < i; j++) {
            float swapped = x[i][j];
            x[i][j] = x[j][i];
            x[j][i] = swapped;
        }
}
#endif

/* Packs the keys and values of [from, to), both in the tile that begins at `start`; the rest of the vectors that they
   begin in and of the term is 0. */
static void pack(const source *s, int64_t start, int64_t from, int64_t to) {
    const element *k[KEYS], *v[KEYS];
    int64_t used = (to - start + W - 1) / W * W;
    for (int64_t i = 0; i < used; i++) {
        int64_t key = start + i;
        int inside = key >= from && key < to;
        int64_t offset = inside ? (s->table[key / s->block] * s->block + key % s->block) * s->row : 0;
        k[i] = inside ? s->k + offset : nothing;
        v[i] = inside ? s->v + offset : nothing;
    }
    int64_t width = s->dim / PER_TERM;
    for (int64_t i = 0; i < used; i += W) {
        int64_t d = 0;
        for (; d + W <= width; d += W) {
            vec x[W];
            for (int j = 0; j < W; j++) x[j] = terms(k[i + j] + d * PER_TERM);
            transpose(x);
            for (int j = 0; j < W; j++) store(packed.keys + (d + j) * KEYS + i, x[j]);
        }
        for (; d < width; d++)
            for (int j = 0; j < W; j++) {
#if PER_TERM == 2
                memcpy(packed.keys + d * KEYS + i + j, k[i + j] + 2 * d, sizeof(term));
#else
                packed.keys[d * KEYS + i + j] = number(k[i + j][d]);
#endif
            }
    }
    for (int64_t i = 0; i < used; i += PER_TERM) {
        term *out = packed.values + i / PER_TERM * s->dim;
#if PER_TERM == 2
        const element *low = v[i], *high = v[i + 1];
        for (int64_t d = 0; d < s->dim; d++) out[d] = (term)low[d] | (term)high[d] << 16;
#else
        for (int64_t d = 0; d < s->dim; d += W) store(out + d, numbers(v[i] + d));
#endif
    }
}

/* Whether all values of [from, to) are finite. */
static int all_finite(const source *s, int64_t from, int64_t to) {
    int64_t all = 1;
    for (int64_t key = from; key < to; key++)
        all &= is_finite(s->v + (s->table[key / s->block] * s->block + key % s->block) * s->row, s->dim);
    return all;
}

/* Rows [first, first + count), count <= ROWS, attend to the packed tile that begins at `start`. */
static void attend_tile(const source *s, int64_t start, int64_t first, int64_t count) {
    _Alignas(64) float scores[ROWS][KEYS], factor[16] = {0};
    _Alignas(64) term weights[ROWS][KEYS / PER_TERM];
    float base[ROWS];
    int64_t width = s->dim / PER_TERM, last = state.position[first + count - 1];
    int64_t used = LEAST(KEYS, (last - start + W) / W * W);
    product_from_zero(count, used, state.query + first * width, width, packed.keys, KEYS, width, scores[0], KEYS);
    ivec lane;
    for (int i = 0; i < W; i++) lane[i] = i;
    for (int64_t r = 0; r < count; r++) {
        int64_t position = state.position[first + r], from = first_key(s, position) - start, to = position + 1 - start;
        vec scale = splat(s->scale), best = splat(-INFINITY);
        if (from <= 0 && to >= used) {
            for (int64_t i = 0; i < used; i += W) {
                vec x = load(scores[r] + i) * scale;
                store(scores[r] + i, x);
                best = higher(best, x);
            }
        } else {
            for (int64_t i = 0; i < used; i += W) {
                ivec key = lane + (int32_t)i, seen = (key >= (int32_t)MOST(from, 0)) & (key < (int32_t)MOST(to, 0));
                vec x = where(seen, load(scores[r] + i) * scale, splat(-INFINITY));
                store(scores[r] + i, x);
                best = higher(best, x);
            }
        }
        float top = highest_of(best);
        top = MOST(top, state.top[first + r]);
        base[r] = top == -INFINITY ? 0 : top;
        factor[r] = state.top[first + r] - base[r];
        state.top[first + r] = top;
    }
    for (int64_t r = 0; r < count; r += W) store(factor + r, exp_(load(factor + r)));
    for (int64_t r = 0; r < count; r++) {
        vec total = load(state.total[first + r]) * splat(factor[r]), high = splat(base[r]);
        for (int64_t i = 0; i < used; i += W) {
            vec e = exp_(load(scores[r] + i) - high);
            total += e;
            write_weights(weights[r], i, e);
        }
        store(state.total[first + r], total);
    }
    product_added(count, s->dim, weights[0], KEYS / PER_TERM, packed.values, s->dim, used / PER_TERM,
                  state.out + first * s->dim, s->dim, factor);
}

/* Rows [first, end) of the block attend to the tile that begins at `start`. */
static void attend_rows(const source *s, int64_t start, int64_t first, int64_t end) {
    for (int64_t r = first; r < end; r += ROWS) {
        int64_t count = LEAST(ROWS, end - r);
        if (state.position[r + count - 1] >= start && first_key(s, state.position[r]) < start + KEYS)
            attend_tile(s, start, r, count);
    }
}

/* The block attends to all it may see. */
static void attend_block(const source *s) {
    int64_t low = state.position[0], high = state.position[state.count - 1];
    for (int64_t start = first_key(s, low) / KEYS * KEYS; start <= high; start += KEYS) {
        int64_t from = MOST(start, first_key(s, low)), to = LEAST(start + KEYS, high + 1);
        int hidden = low + 1 < to || first_key(s, high) > from; /* from some rows: 0 times infinity is not 0 */
        if (low == high || !hidden || all_finite(s, from, to)) {
            pack(s, start, from, to);
            attend_rows(s, start, 0, state.count);
            continue;
        }
        for (int64_t r = 0, end; r < state.count; r = end) {
            int64_t position = state.position[r];
            for (end = r; end < state.count && state.position[end] == position;) end++;
            from = MOST(start, first_key(s, position));
            to = LEAST(start + KEYS, position + 1);
            if (from < to) pack(s, start, from, to), attend_rows(s, start, r, end);
        }
    }
}

/* Reads `heads` query heads of `tokens` tokens, which stand at `positions`, from q, has them attend, and writes out. */
static void attend_heads(const source *s, const element *q, int64_t q_stride, element *out, int64_t out_stride,
                         const int64_t *positions, int64_t tokens, int64_t heads) {
    int64_t dim = s->dim, width = dim / PER_TERM;
    state.count = tokens * heads;
    for (int64_t r = 0; r < state.count; r++) {
        const element *from = q + r / heads * q_stride + r % heads * dim;
        state.position[r] = positions[r / heads];
        state.top[r] = -INFINITY;
        store(state.total[r], splat(0));
#if PER_TERM == 2
        memcpy(state.query + r * width, from, dim * sizeof(element));
#else
        for (int64_t d = 0; d < dim; d += W) store(state.query + r * width + d, numbers(from + d));
#endif
    }
    memset(state.out, 0, state.count * dim * sizeof(float));
    attend_block(s);
    for (int64_t r = 0; r < state.count; r++) {
        element *to = out + r / heads * out_stride + r % heads * dim;
        vec inverse = splat(1.0f / sum_of(load(state.total[r])));
        /* Adding 0 makes -0 into 0: how often 0 was added to a sum must not show. */
        for (int64_t d = 0; d < dim; d += W) write(to + d, load(state.out + r * dim + d) * inverse + splat(0));
    }
}

/* One slice of a batch: `tokens` rows of a request, the first of them row `row` of q and out. Their positions ascend. */
typedef struct {
    int64_t row, tokens;
    const int64_t *table;
} slice;

/* Rows of q, which stand at `positions`, attend to the pages of their requests. q rows are q_stride apart; out [rows, heads * dim]; dim is a multiple
   of 16, up to 256. The work is split into pieces; every `parts`th from `part` is done. */
void attend(const slice *slices, int64_t count, const int64_t *positions, const element *q, int64_t q_stride,
            const element *k_pool, const element *v_pool, element *out, int64_t heads, int64_t kv_heads, int64_t dim,
            int64_t block, int64_t window, float scale, int64_t part, int64_t parts) {
    int64_t group = heads / kv_heads, some = LEAST(group, BLOCK), piece = 0;
    for (int64_t i = 0; i < count; i++) {
        const slice *one = slices + i;
        for (int64_t h = 0; h < kv_heads; h++) {
            source s = {k_pool + h * dim, v_pool + h * dim, one->table, block, kv_heads * dim, dim, window, scale};
            for (int64_t t = 0; t < one->tokens; t += BLOCK / some)
                for (int64_t g = 0; g < group; g += some) {
                    if (piece++ % parts != part) continue;
                    int64_t head = h * group + g, row = one->row + t;
                    attend_heads(&s, q + row * q_stride + head * dim, q_stride, out + (row * heads + head) * dim,
                                 heads * dim, positions + row, LEAST(BLOCK / some, one->tokens - t),
                                 LEAST(some, group - g));
                }
        }
    }
}
