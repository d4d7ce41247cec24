/* The engine's CPU kernels: everything of a decoder layer that PyTorch's eager operators leave slow on small batches.
 *
 * `ops.c` is included once per element type (float, bfloat16). Arithmetic is always in float; bfloat16 is only how
 * values are stored. Vectors are GCC's generic ones, so the file compiles for any target; the matrix product for
 * bfloat16 needs AVX512-BF16 and is left out elsewhere (`has_gemm_bf16` tells).
 *
 * Every result of a row depends on that row alone (fixed order of summation, no split over threads inside a sum):
 * a sequence's tokens do not depend on what else is in the batch.
 *
 * A kernel is a list of loops that the threads of the caller's parallel region share (`omp for` without `parallel`);
 * `run` opens the region once for as many kernels as it is given. `op_NAME` unpacks a kernel's arguments.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

typedef float v16 __attribute__((vector_size(64), aligned(4)));
typedef int32_t i16 __attribute__((vector_size(64)));
typedef uint32_t u16 __attribute__((vector_size(64)));
typedef uint16_t h16 __attribute__((vector_size(32), aligned(2)));
typedef uint16_t bf16;

#define INLINE static inline __attribute__((always_inline))
#define MAX_RANK 1024 /* as in adapter.py */
#define BLOCK 16 /* tokens of a KV block: one vector of keys */

/* What the kernels must know of a step's batch: `engine/batch.py` as addresses. */
typedef struct {
    const int32_t *position, *kv_slot;           /* [rows] */
    const int32_t *query_start;                  /* [sequences + 1] */
    const int32_t *context;                      /* [sequences] */
    const int32_t *tables;                       /* [sequences, table_width] */
    const int32_t *seg_slot, *seg_start, *seg_end; /* [segments] */
    int64_t rows, sequences, table_width, max_context, segments;
} Batch;

/* Arguments of a call are 64-bit words: addresses, integers, and doubles by their bits. */
#define ADDRESS(i) ((void *)(intptr_t)a[i])
#define INTEGER(i) ((int)a[i])
INLINE float real(int64_t bits) {
    union { int64_t i; double d; } c = {.i = bits};
    return (float)c.d;
}
#define REAL(i) real(a[i])

enum { CALL_WORDS = 16 };
typedef void kernel(const int64_t *a);

/* Runs `count` calls, one after the other, on `threads` threads: each [CALL_WORDS], the kernel's address first.
 * Between two kernels the threads only meet at a barrier; waking them for each would cost as much as a small kernel. */
void run(const int64_t *calls, int count, int threads) {
#pragma omp parallel num_threads(threads)
    for (int c = 0; c < count; c++) ((kernel *)(intptr_t)calls[(int64_t)c * CALL_WORDS])(calls + (int64_t)c * CALL_WORDS + 1);
}

INLINE v16 pick16(i16 mask, v16 a, v16 b) { return (v16)(((i16)a & mask) | ((i16)b & ~mask)); }
INLINE v16 splat(float x) { return x - (v16){0}; }

INLINE float load_f32(const float *p) { return *p; }
INLINE void store_f32(float *p, float x) { *p = x; }
INLINE v16 load16_f32(const float *p) { return *(const v16 *)p; }
INLINE void store16_f32(float *p, v16 x) { *(v16 *)p = x; }

INLINE float load_bf16(const bf16 *p) {
    union { uint32_t u; float f; } c = {.u = (uint32_t)*p << 16};
    return c.f;
}
INLINE void store_bf16(bf16 *p, float x) {
    union { float f; uint32_t u; } c = {.f = x};
    if (x != x) { *p = 0x7fc0; return; }
    *p = (bf16)((c.u + 0x7fff + ((c.u >> 16) & 1)) >> 16);
}
INLINE v16 load16_bf16(const bf16 *p) {
    u16 wide = __builtin_convertvector(*(const h16 *)p, u16) << 16;
    return (v16)wide;
}
INLINE void store16_bf16(bf16 *p, v16 x) {
#if defined(__AVX512BF16__)
    _mm256_storeu_si256((__m256i *)p, (__m256i)_mm512_cvtneps_pbh((__m512)x));
#else
    u16 u = (u16)x;
    u = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    u = (u16)pick16((i16)(x == x), (v16)u, (v16)((i16){0} + 0x7fc0));
    *(h16 *)p = __builtin_convertvector(u, h16);
#endif
}

INLINE void prefetch(const void *start, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch((const char *)start + i);
}

INLINE float sum16(v16 x) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)x);
#else
    float s = 0;
    for (int i = 0; i < 16; i++) s += x[i];
    return s;
#endif
}
INLINE v16 max16(v16 a, v16 b) { return pick16((i16)(a > b), a, b); }

/* exp by range reduction to 2^n * p(r), |r| <= ln2/2, degree 7: relative error below 2e-7; 0 below -87. */
INLINE v16 exp16(v16 x) {
    x = pick16((i16)(x < splat(-87.3f)), splat(-87.3f), x);
    x = pick16((i16)(x > splat(88.3f)), splat(88.3f), x);
    v16 scaled = x * 1.44269504088896341f;
    i16 n = __builtin_convertvector(scaled + pick16((i16)(scaled < splat(0)), splat(-0.5f), splat(0.5f)), i16);
    v16 nf = __builtin_convertvector(n, v16);
    v16 r = x - nf * 0.693359375f;
    r = r - nf * -2.12194440e-4f;
    v16 p = splat(1.9841270e-4f);
    p = p * r + 1.3888889e-3f;
    p = p * r + 8.3333333e-3f;
    p = p * r + 4.1666667e-2f;
    p = p * r + 1.6666667e-1f;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    i16 bits = (n + 127) << 23;
    return p * (v16)bits;
}

/* tanh by exp: absolute error below 2e-7. */
INLINE v16 tanh16(v16 x) { return splat(1) - splat(2) / (exp16(x * 2) + 1.0f); }

/* ---- bfloat16 matrix product: y[m][n] = sum_k x[m][k] * w[n][k] (+ bias[n]) ----
 * Weights are packed in panels of 32 outputs: [panel][k/2][32][2], so one step of the inner loop reads two vectors
 * of (weight pairs) and multiplies them with a broadcast pair of every row. */
int has_gemm_bf16(void) {
#if defined(__AVX512BF16__)
    return 1;
#else
    return 0;
#endif
}

#if defined(__AVX512F__)
#define MAX_ROWS 14
#else
#define MAX_ROWS 3 /* accumulators that sixteen 256-bit registers hold */
#endif

#if defined(__AVX512BF16__)
INLINE void gemm_tile(const int R, const int P, const bf16 *x, int64_t ldx, const bf16 *w, int k, int n0, int n,
                      const float *bias, void *y, int64_t ldy, int out_f32) {
    __m512 acc[MAX_ROWS][8];
    const int64_t panel = (int64_t)k * 32;
#pragma GCC unroll 14
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int p = 0; p < 2 * P; p++) acc[r][p] = _mm512_setzero_ps();
    for (int kk = 0; kk < k; kk += 2) {
        __m512bh wv[8];
#pragma GCC unroll 4
        for (int p = 0; p < P; p++) {
            const bf16 *src = w + p * panel + (int64_t)kk * 32;
            wv[2 * p] = (__m512bh)_mm512_loadu_si512(src);
            wv[2 * p + 1] = (__m512bh)_mm512_loadu_si512(src + 32);
        }
#pragma GCC unroll 14
        for (int r = 0; r < R; r++) {
            int pair;
            memcpy(&pair, x + r * ldx + kk, 4);
            __m512bh xv = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 8
            for (int p = 0; p < 2 * P; p++) acc[r][p] = _mm512_dpbf16_ps(acc[r][p], xv, wv[p]);
        }
    }
#pragma GCC unroll 14
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int p = 0; p < 2 * P; p++) {
            int col = n0 + p * 16, left = n - col;
            if (left <= 0) continue;
            __mmask16 mask = left >= 16 ? 0xffff : (__mmask16)((1u << left) - 1);
            __m512 v = acc[r][p];
            if (bias) v = _mm512_add_ps(v, _mm512_maskz_loadu_ps(mask, bias + col));
            if (out_f32)
                _mm512_mask_storeu_ps((float *)y + r * ldy + col, mask, v);
            else
                _mm256_mask_storeu_epi16((bf16 *)y + r * ldy + col, mask, (__m256i)_mm512_cvtneps_pbh(v));
        }
}

#define ROWS_CASE(R, P) \
    case R: gemm_tile(R, P, x, ldx, w, k, n0, n, bias, y, ldy, out_f32); break;

static void gemm_wide(int rows, const bf16 *x, int64_t ldx, const bf16 *w, int k, int n0, int n, const float *bias,
                      void *y, int64_t ldy, int out_f32) {
    switch (rows) { ROWS_CASE(1, 4) ROWS_CASE(2, 4) ROWS_CASE(3, 4) }
}
static void gemm_narrow(int rows, const bf16 *x, int64_t ldx, const bf16 *w, int k, int n0, int n, const float *bias,
                        void *y, int64_t ldy, int out_f32) {
    switch (rows) {
        ROWS_CASE(1, 1) ROWS_CASE(2, 1) ROWS_CASE(3, 1) ROWS_CASE(4, 1) ROWS_CASE(5, 1) ROWS_CASE(6, 1)
        ROWS_CASE(7, 1) ROWS_CASE(8, 1) ROWS_CASE(9, 1) ROWS_CASE(10, 1) ROWS_CASE(11, 1) ROWS_CASE(12, 1)
        ROWS_CASE(13, 1) ROWS_CASE(14, 1)
    }
}
#endif

/* x [m, k] bf16, w packed for n outputs, bias [n] float or NULL, y [m, n] bf16 or float. k even. */
static void gemm_bf16(const bf16 *x, int m, int k, const bf16 *w, int n, const float *bias, void *y, int out_f32) {
#if defined(__AVX512BF16__)
    const int panels = (n + 31) / 32;
    /* Few rows: the weights' bytes are the work, and four panels at once read them in four streams. But no thread may
     * be left without work for long: products of few panels are cut finer. */
    const int group = m > 3 ? 1 : panels >= 64 ? 4 : 1, tasks = (panels + group - 1) / group;
    const int tiles = (m + MAX_ROWS - 1) / MAX_ROWS, rows = (m + tiles - 1) / (tiles ? tiles : 1);
    const int64_t size = out_f32 ? 4 : 2;
    const int grain = tasks >= 128 ? 8 : tasks >= 32 ? 3 : 1;
#pragma omp for schedule(dynamic, grain)
    for (int task = 0; task < tasks; task++) {
        int first = task * group, count = panels - first < group ? panels - first : group;
        if (count == 4) {
            gemm_wide(m, x, k, w + (int64_t)first * k * 32, k, first * 32, n, bias, y, n, out_f32);
            continue;
        }
        for (int p = first; p < first + count; p++)
            for (int r0 = 0; r0 < m; r0 += rows)
                gemm_narrow(m - r0 < rows ? m - r0 : rows, x + (int64_t)r0 * k, k, w + (int64_t)p * k * 32, k, p * 32, n,
                            bias, (char *)y + (int64_t)r0 * n * size, n, out_f32);
    }
#else
    (void)x, (void)m, (void)k, (void)w, (void)n, (void)bias, (void)y, (void)out_f32;
#endif
}
void op_gemm_bf16(const int64_t *a) {
    gemm_bf16(ADDRESS(0), INTEGER(1), INTEGER(2), ADDRESS(3), INTEGER(4), ADDRESS(5), ADDRESS(6), INTEGER(7));
}

#define T float
#define NAME(f) f##_f32
#define LOAD load_f32
#define STORE store_f32
#define LOAD16 load16_f32
#define STORE16 store16_f32
#define LANES v16
#define LOADLANES load16_f32
#define MULADD(sum, a, b) ((sum) + (a) * (b))
#define STEP 1
#include "ops.c"

#define T bf16
#define NAME(f) f##_bf16
#define LOAD load_bf16
#define STORE store_bf16
#define LOAD16 load16_bf16
#define STORE16 store16_bf16
#if defined(__AVX512BF16__)
#define LANES __m512bh
#define LOADLANES(p) ((__m512bh)_mm512_loadu_si512(p))
#define MULADD(sum, a, b) ((v16)_mm512_dpbf16_ps((__m512)(sum), a, b))
#define STEP 2
#else
#define LANES v16
#define LOADLANES load16_bf16
#define MULADD(sum, a, b) ((sum) + (a) * (b))
#define STEP 1
#endif
#include "ops.c"
