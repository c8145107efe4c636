/* A linear layer whose rows never depend on each other: float32 or, with -DBFLOAT16, bfloat16. fixed_linear.py calls it
   and says what for. All tensors are dense. Each output is one sum in float32 over the inputs in their order, whatever
   the row's place in a tile and the height of the tile: native_build.py forbids the compiler to reorder or to fuse. */
#include <stdint.h>
#include <string.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(BFLOAT16)
typedef uint16_t real;
static inline float get(real x) {
    uint32_t bits = (uint32_t)x << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}
static inline real put(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return x == x ? (real)((bits + 0x7fff + (bits >> 16 & 1)) >> 16) : 0x7fc0;
}
#else
typedef float real;
static inline float get(real x) { return x; }
static inline real put(float x) { return x; }
#endif

/* Vectors of LANES floats; WIDTH of them make a panel of outputs. HEIGHT rows and a panel fill the registers. */
#if defined(__AVX512F__)
#define LANES 16
#define WIDTH 4
typedef __m512 vector;
static inline vector splat(float x) { return _mm512_set1_ps(x); }
static inline vector fma_(vector a, vector b, vector c) { return _mm512_fmadd_ps(a, b, c); }
static inline vector read(const float *p) { return _mm512_loadu_ps(p); }
static inline void write(float *p, vector x) { _mm512_storeu_ps(p, x); }
#if defined(BFLOAT16)
static inline vector widen(const real *p) {
    return (vector)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16);
}
#endif
#elif defined(__AVX2__) && defined(__FMA__)
#define LANES 8
#define WIDTH 2
typedef __m256 vector;
static inline vector splat(float x) { return _mm256_set1_ps(x); }
static inline vector fma_(vector a, vector b, vector c) { return _mm256_fmadd_ps(a, b, c); }
static inline vector read(const float *p) { return _mm256_loadu_ps(p); }
static inline void write(float *p, vector x) { _mm256_storeu_ps(p, x); }
#if defined(BFLOAT16)
static inline vector widen(const real *p) {
    return (vector)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)), 16);
}
#endif
#else
#define LANES 4
#define WIDTH 4
typedef float vector __attribute__((vector_size(16)));
static inline vector splat(float x) { return (vector){x, x, x, x}; }
static inline vector fma_(vector a, vector b, vector c) { return a * b + c; }
static inline vector read(const float *p) {
    vector x;
    memcpy(&x, p, sizeof x);
    return x;
}
static inline void write(float *p, vector x) { memcpy(p, &x, sizeof x); }
#if defined(BFLOAT16)
static inline vector widen(const real *p) { return (vector){get(p[0]), get(p[1]), get(p[2]), get(p[3])}; }
#endif
#endif
#if !defined(BFLOAT16)
static inline vector widen(const real *p) { return read(p); }
#endif
#define PANEL (LANES * WIDTH)
#define HEIGHT 6
#define ROWS 96     /* of x, and */
#define INPUTS 1024 /* of a panel: together they stay in the second-level cache */

/* The dot product of pairs, where the processor has it: STEP inputs at a time, and x is read as it is. */
#if defined(BFLOAT16) && defined(__AVX512BF16__)
#define STEP 2
typedef real operand;
#else
#define STEP 1
typedef float operand;
#endif

/* Bytes of packed weights [outputs, inputs], and of the scratch memory that `linear` needs for x [rows, inputs]. */
int64_t packed_bytes(int64_t outputs, int64_t inputs) {
    int64_t steps = (inputs + STEP - 1) / STEP;
    return (outputs + PANEL - 1) / PANEL * PANEL * steps * STEP * (int64_t)sizeof(real);
}
int64_t scratch_bytes(int64_t rows, int64_t inputs) {
    int64_t padded = (inputs + STEP - 1) / STEP * STEP;
    return sizeof(operand) == sizeof(real) && padded == inputs ? 0 : rows * padded * (int64_t)sizeof(operand);
}

/* weight [outputs, inputs] -> packed [panels, inputs / STEP, PANEL, STEP], zeros where there is nothing. */
void pack(const real *weight, real *packed, int64_t outputs, int64_t inputs) {
    int64_t steps = (inputs + STEP - 1) / STEP;
    memset(packed, 0, packed_bytes(outputs, inputs));
    for (int64_t o = 0; o < outputs; o++) {
        real *panel = packed + o / PANEL * steps * PANEL * STEP + o % PANEL * STEP;
        for (int64_t k = 0; k < inputs; k++) panel[k / STEP * PANEL * STEP + k % STEP] = weight[o * inputs + k];
    }
}

/* sums [R, PANEL] += x [R, steps * STEP] (rows `stride` apart) times a part of a panel. Inlined for each R. */
static inline __attribute__((always_inline)) void multiply(
    const operand *x, int64_t stride, const real *panel, int64_t steps, float *sums, const int R) {
    vector sum[HEIGHT][WIDTH];
    for (int r = 0; r < R; r++)
        for (int v = 0; v < WIDTH; v++) sum[r][v] = read(sums + r * PANEL + v * LANES);
    for (int64_t k = 0; k < steps; k++, panel += PANEL * STEP) {
#if STEP == 2
        __m512bh weight[WIDTH];
        for (int v = 0; v < WIDTH; v++) weight[v] = (__m512bh)_mm512_loadu_si512(panel + v * LANES * 2);
        for (int r = 0; r < R; r++) {
            int32_t pair;
            memcpy(&pair, x + r * stride + 2 * k, 4);
            for (int v = 0; v < WIDTH; v++)
                sum[r][v] = _mm512_dpbf16_ps(sum[r][v], (__m512bh)_mm512_set1_epi32(pair), weight[v]);
        }
#else
        vector weight[WIDTH];
        for (int v = 0; v < WIDTH; v++) weight[v] = widen(panel + v * LANES);
        for (int r = 0; r < R; r++) {
            vector value = splat(x[r * stride + k]);
            for (int v = 0; v < WIDTH; v++) sum[r][v] = fma_(value, weight[v], sum[r][v]);
        }
#endif
    }
    for (int r = 0; r < R; r++)
        for (int v = 0; v < WIDTH; v++) write(sums + r * PANEL + v * LANES, sum[r][v]);
}

static void multiply_some(const operand *x, int64_t stride, const real *panel, int64_t steps, float *sums,
                          int64_t rows) {
    switch (rows) {
        case 1: multiply(x, stride, panel, steps, sums, 1); break;
        case 2: multiply(x, stride, panel, steps, sums, 2); break;
        case 3: multiply(x, stride, panel, steps, sums, 3); break;
        case 4: multiply(x, stride, panel, steps, sums, 4); break;
        case 5: multiply(x, stride, panel, steps, sums, 5); break;
        default: multiply(x, stride, panel, steps, sums, HEIGHT);
    }
}

/* y = x W^T + bias + residual for panels [first, last): x [rows, inputs], y and residual [rows, outputs]; bias [outputs]
   and residual may be null. Each output is one sum over the inputs in their order. `x` is what `spread` made of it. */
void linear(const operand *x, const real *packed, const real *bias, const real *residual, real *y, int64_t rows,
            int64_t inputs, int64_t outputs, int64_t first, int64_t last) {
    int64_t all = (inputs + STEP - 1) / STEP, stride = all * STEP;
    float sums[ROWS * PANEL];
    for (int64_t p = first; p < last; p++) {
        const real *panel = packed + p * all * PANEL * STEP;
        int64_t from = p * PANEL, count = outputs - from < PANEL ? outputs - from : PANEL;
        for (int64_t row = 0; row < rows; row += ROWS) {
            int64_t some = rows - row < ROWS ? rows - row : ROWS;
            memset(sums, 0, some * PANEL * sizeof(float));
            for (int64_t k = 0; k < all; k += INPUTS) {
                int64_t steps = all - k < INPUTS ? all - k : INPUTS;
                for (int64_t r = 0; r < some; r += HEIGHT)
                    multiply_some(x + (row + r) * stride + k * STEP, stride, panel + k * PANEL * STEP, steps,
                                  sums + r * PANEL, some - r < HEIGHT ? some - r : HEIGHT);
            }
            for (int64_t r = 0; r < some; r++) {
                int64_t place = (row + r) * outputs + from;
                float *sum = sums + r * PANEL;
                if (bias)
                    for (int64_t j = 0; j < count; j++) sum[j] += get(bias[from + j]);
                if (residual)
                    for (int64_t j = 0; j < count; j++) sum[j] += get(residual[place + j]);
                for (int64_t j = 0; j < count; j++) y[place + j] = put(sum[j]);
            }
        }
    }
}

/* x [rows, inputs] -> scratch [rows, inputs rounded up to STEP], as `linear` reads it. */
void spread(const real *x, operand *scratch, int64_t rows, int64_t inputs) {
    int64_t padded = (inputs + STEP - 1) / STEP * STEP;
    for (int64_t r = 0; r < rows; r++, x += inputs, scratch += padded) {
        scratch[padded - 1] = 0;
#if STEP == 2
        memcpy(scratch, x, inputs * sizeof(real));
#else
        for (int64_t k = 0; k < inputs; k++) scratch[k] = get(x[k]);
#endif
    }
}

int64_t panel_outputs(void) { return PANEL; }
