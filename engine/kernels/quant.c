/* Included by ops.c once per element type T: products with quantised weights.
 *
 * Weights are codes in panels of 32 outputs (code_panels.py says in which order). CHUNK inputs at a time are widened
 * to T: for many rows once into a buffer that stays in the first cache, for a few rows in registers, where reading
 * the codes is the work. Sums are per chunk, then over chunks, for any number of rows: a row's result depends on that
 * row alone. */

#ifndef QUANT_C
#define QUANT_C
enum { CHUNK = 256 /* a multiple of NF4's blocks of 64 */, CHUNK_ROWS = 112, NF4_BLOCK = 64 };
enum { FEW_ROWS = 8 /* are computed in registers */, AHEAD = 2048 /* bytes of codes to fetch before they are needed */ };
enum { INT8, NF4 };

/* A panel of one weight: int8 with a scale for each output, or nf4 with a scale for each output and block of inputs. */
typedef struct {
    const uint8_t *codes;
    const float *scale;
} Panel;

typedef struct {
    int form, k, n;
    const uint8_t *codes;
    const float *scale;
} Codes;

INLINE Panel panel_of(const Codes *w, int p) {
    const int64_t inputs = w->k;
    if (w->form == INT8) return (Panel){w->codes + p * inputs * 32, w->scale + p * 32};
    return (Panel){w->codes + p * inputs * 16, w->scale + p * (inputs / NF4_BLOCK) * 32};
}
/* The same panel from input k0 on. */
INLINE Panel panel_from(const Codes *w, Panel panel, int k0) {
    if (w->form == INT8) return (Panel){panel.codes + (int64_t)k0 * 32, panel.scale};
    return (Panel){panel.codes + (int64_t)k0 * 16, panel.scale + k0 / NF4_BLOCK * 32};
}

static const float nf4_levels[16] = {
    -1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f,
    -0.18477343022823334f, -0.09105003625154495f, 0.0f, 0.07958029955625534f, 0.16093020141124725f,
    0.24611230194568634f, 0.33791524171829224f, 0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f};

/* Inputs k, k + 1 of an int8 panel are 64 bytes; where the code of (input, output) is among them. */
INLINE int int8_place(int input, int output) {
    int word = (output & 15) * 2 + input;
    return word / 8 * 16 + output / 16 * 8 + word % 8;
}
/* Sign and magnitude: the magnitude is a table's index. */
INLINE float int8_value(uint8_t code) { return code & 128 ? -(float)(code & 127) : (float)code; }

/* Inputs k .. k + 3 of an nf4 panel are 64 bytes: 16 lanes of 8 codes. */
INLINE int nf4_code(const uint8_t *four, int input, int output) {
    int lane = output % 8 * 2 + input % 2, code = input / 2 * 4 + output / 16 * 2 + output / 8 % 2;
    return four[lane * 4 + code / 2] >> (code % 2 * 4) & 15;
}

#if defined(__AVX512BF16__) && defined(__AVX512VBMI__)
#define QUANT_VECTORS
/* bfloat16 of 0 .. 127, low and high bytes apart. */
static uint8_t int8_low[128] __attribute__((aligned(64))), int8_high[128] __attribute__((aligned(64)));
__attribute__((constructor)) static void fill_int8_tables(void) {
    for (int i = 0; i < 128; i++) {
        bf16 bits;
        store_bf16(&bits, (float)i);
        int8_low[i] = (uint8_t)bits, int8_high[i] = (uint8_t)(bits >> 8);
    }
}

typedef struct { __m512i low0, low1, high0, high1; } Int8Tables;
INLINE Int8Tables int8_tables(void) {
    return (Int8Tables){_mm512_load_si512(int8_low), _mm512_load_si512(int8_low + 64), _mm512_load_si512(int8_high),
                        _mm512_load_si512(int8_high + 64)};
}
/* Two inputs of 32 outputs: 64 codes -> pairs of 16 outputs, and of the other 16. */
INLINE void widen_int8(const uint8_t *codes, Int8Tables t, __m512i *first, __m512i *second) {
    __m512i c = _mm512_loadu_si512(codes);
    __m512i low = _mm512_permutex2var_epi8(t.low0, c, t.low1), high = _mm512_permutex2var_epi8(t.high0, c, t.high1);
    high = _mm512_ternarylogic_epi32(high, c, _mm512_set1_epi8((char)0x80), 0xf8); /* high | (c & sign) */
    *first = _mm512_unpacklo_epi8(low, high);
    *second = _mm512_unpackhi_epi8(low, high);
}

/* The scales of one block, as its float lanes want them: each output's twice. */
INLINE void nf4_scales(const float *scale, __m512 out[4]) {
    const __m512i twice = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
    const __m512i upper = _mm512_add_epi32(twice, _mm512_set1_epi32(8));
    for (int v = 0; v < 2; v++) {
        __m512 sixteen = _mm512_loadu_ps(scale + 16 * v);
        out[2 * v] = _mm512_permutexvar_ps(twice, sixteen);
        out[2 * v + 1] = _mm512_permutexvar_ps(upper, sixteen);
    }
}
/* Four inputs of 32 outputs: 128 codes -> for each pair of inputs, pairs of 16 outputs and of the other 16. */
INLINE void widen_nf4(const uint8_t *codes, __m512 levels, const __m512 scale[4], __m512i out[4]) {
    __m512i c = _mm512_loadu_si512(codes);
    __m512 f[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++)
        f[i] = _mm512_mul_ps(_mm512_permutexvar_ps(_mm512_srli_epi32(c, 4 * i), levels), scale[i % 4]);
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) out[i] = (__m512i)_mm512_cvtne2ps_pbh(f[2 * i + 1], f[2 * i]);
}

#define DOT(vector) \
    _Pragma("GCC unroll 8") for (int r = 0; r < R; r++) { \
        int pair; \
        memcpy(&pair, x + r * ldx + kk, 4); \
        __m512bh xv = (__m512bh)_mm512_set1_epi32(pair); \
        acc[p][r][0] = _mm512_dpbf16_ps(acc[p][r][0], xv, (__m512bh)(vector)[0]); \
        acc[p][r][1] = _mm512_dpbf16_ps(acc[p][r][1], xv, (__m512bh)(vector)[1]); \
    }

/* sums[p][r][0..31] for R rows and P panels: the codes are read once and widened in registers. */
INLINE void code_tile(const int R, const int P, const int form, const bf16 *x, int64_t ldx, const Codes *w, int first,
                      float sums[][FEW_ROWS][32]) {
    const Int8Tables tables = int8_tables();
    const __m512 levels = _mm512_loadu_ps(nf4_levels);
    const uint8_t *codes[2];
    const float *scale[2];
    for (int p = 0; p < P; p++) {
        Panel panel = panel_of(w, first + p);
        codes[p] = panel.codes, scale[p] = panel.scale;
    }
    for (int k0 = 0; k0 < w->k; k0 += CHUNK) {
        const int end = k0 + CHUNK < w->k ? k0 + CHUNK : w->k;
        __m512 acc[2][FEW_ROWS][2];
#pragma GCC unroll 2
        for (int p = 0; p < P; p++)
#pragma GCC unroll 8
            for (int r = 0; r < R; r++) acc[p][r][0] = acc[p][r][1] = _mm512_setzero_ps();
        if (form == INT8)
            for (int kk = k0; kk < end; kk += 2)
#pragma GCC unroll 2
                for (int p = 0; p < P; p++) {
                    __m512i v[2];
                    const uint8_t *pairs = codes[p] + (int64_t)kk * 32;
                    __builtin_prefetch(pairs + AHEAD);
                    widen_int8(pairs, tables, v, v + 1);
                    DOT(v)
                }
        else
            for (int b = k0; b < end; b += NF4_BLOCK)
#pragma GCC unroll 2
                for (int p = 0; p < P; p++) {
                    __m512 wide[4];
                    nf4_scales(scale[p] + b / NF4_BLOCK * 32, wide);
                    for (int kk = b; kk < b + NF4_BLOCK; kk += 2) {
                        __m512i v[4];
                        const uint8_t *fours = codes[p] + (int64_t)kk * 16;
                        __builtin_prefetch(fours + AHEAD);
                        widen_nf4(fours, levels, wide, v);
                        DOT(v)
                        kk += 2;
                        DOT(v + 2)
                    }
                }
#pragma GCC unroll 2
        for (int p = 0; p < P; p++)
#pragma GCC unroll 8
            for (int r = 0; r < R; r++)
#pragma GCC unroll 2
                for (int h = 0; h < 2; h++) {
                    __m512 sum = acc[p][r][h];
                    if (k0) sum = _mm512_add_ps(_mm512_loadu_ps(sums[p][r] + 16 * h), sum);
                    _mm512_storeu_ps(sums[p][r] + 16 * h, sum);
                }
    }
}
#undef DOT

/* Two panels at a time are two streams of codes, as long as their sums stay in registers. */
#define TILE(R, P, FORM) case R: code_tile(R, P, FORM, x, ldx, w, first, sums); break;
#define TILES(NAME, FORM) \
    static void NAME(int rows, int panels, const bf16 *x, int64_t ldx, const Codes *w, int first, float sums[][FEW_ROWS][32]) { \
        if (panels == 2) switch (rows) { TILE(1, 2, FORM) TILE(2, 2, FORM) TILE(3, 2, FORM) } \
        else switch (rows) { \
            TILE(1, 1, FORM) TILE(2, 1, FORM) TILE(3, 1, FORM) TILE(4, 1, FORM) TILE(5, 1, FORM) TILE(6, 1, FORM) \
            TILE(7, 1, FORM) TILE(8, 1, FORM) \
        } \
    }
TILES(int8_tiles, INT8)
TILES(nf4_tiles, NF4)
#undef TILE
#undef TILES
#endif
#endif

/* Inputs k0 .. k0 + count of a panel as T: [count][32], or [count / 2][32][2] where pairs are multiplied at once. */
static void NAME(widen)(const Codes *w, Panel panel, int k0, int count, T *out) {
    panel = panel_from(w, panel, k0);
#if STEP == 2 && defined(QUANT_VECTORS)
    if (w->form == INT8) {
        const Int8Tables tables = int8_tables();
        for (int k = 0; k < count; k += 2) {
            __m512i v[2];
            __builtin_prefetch(panel.codes + k * 32 + CHUNK * 32, 0, 2);
            widen_int8(panel.codes + k * 32, tables, v, v + 1);
            _mm512_store_si512(out + k * 32, v[0]);
            _mm512_store_si512(out + k * 32 + 32, v[1]);
        }
        return;
    }
    const __m512 levels = _mm512_loadu_ps(nf4_levels);
    for (int b = 0; b < count; b += NF4_BLOCK) {
        __m512 scale[4];
        nf4_scales(panel.scale + b / NF4_BLOCK * 32, scale);
        for (int k = b; k < b + NF4_BLOCK; k += 4) {
            __m512i v[4];
            __builtin_prefetch(panel.codes + k * 16 + CHUNK * 16, 0, 2);
            widen_nf4(panel.codes + k * 16, levels, scale, v);
            for (int i = 0; i < 4; i++) _mm512_store_si512(out + k * 32 + i * 32, v[i]);
        }
    }
#else
    for (int k = 0; k < count; k++)
        for (int c = 0; c < 32; c++) {
            float value;
            if (w->form == INT8) value = int8_value(panel.codes[k / 2 * 64 + int8_place(k % 2, c)]);
            else value = nf4_levels[nf4_code(panel.codes + k / 4 * 64, k % 4, c)] * panel.scale[k / NF4_BLOCK * 32 + c];
            STORE(out + (STEP == 2 ? k / 2 * 64 + c * 2 + k % 2 : k * 32 + c), value);
        }
#endif
}

/* sums[rows][32] over `count` inputs of a widened panel. */
static void NAME(wide_tile)(int rows, const T *x, int64_t ldx, const T *wide, int count, float *sums) {
#if STEP == 2
    gemm_narrow(rows, x, ldx, wide, count, 0, 32, NULL, sums, 32, 1);
#else
    switch (rows) {
#define TILE(R) case R: NAME(product_tile)(R, x, ldx, wide, count, sums); break;
        TILE(1) TILE(2) TILE(3)
#if MAX_ROWS > 3
        TILE(4) TILE(5) TILE(6) TILE(7) TILE(8) TILE(9) TILE(10) TILE(11) TILE(12) TILE(13) TILE(14)
#endif
#undef TILE
    }
#endif
}

/* y[row][32 p ..] = sums * scale + bias. */
INLINE void NAME(store_sums)(const float *sums, const Codes *w, int p, const float *bias, int64_t row, void *y, int out_f32) {
    const int n = w->n, width = n - p * 32 < 32 ? n - p * 32 : 32;
    float out[32];
    for (int c = 0; c < width; c++) {
        float sum = w->form == INT8 ? sums[c] * w->scale[p * 32 + c] : sums[c];
        out[c] = bias ? sum + bias[p * 32 + c] : sum;
    }
    if (out_f32) memcpy((float *)y + row * n + p * 32, out, width * sizeof(float));
    else if (width == 32)
        for (int c = 0; c < 32; c += 16) STORE16((T *)y + row * n + p * 32 + c, *(v16 *)(out + c));
    else
        for (int c = 0; c < width; c++) STORE((T *)y + row * n + p * 32 + c, out[c]);
}

/* y[m][n] = sum_k x[m][k] * w[n][k] (+ bias[n]): x [m, k], bias [n] float or NULL, y [m, n] of T or float. */
static void NAME(code_product)(const T *x, int m, const Codes *w, const float *bias, void *y, int out_f32) {
    const int panels = (w->n + 31) / 32, k = w->k;
#if STEP == 2 && defined(QUANT_VECTORS)
    if (m <= FEW_ROWS) {
        const int group = m <= 3 && panels >= 64 ? 2 : 1, tasks = (panels + group - 1) / group;
#pragma omp for schedule(dynamic, tasks >= 128 ? 16 : 1)
        for (int task = 0; task < tasks; task++) {
            const int first = task * group, count = panels - first < group ? panels - first : group;
            float sums[2][FEW_ROWS][32];
            (w->form == INT8 ? int8_tiles : nf4_tiles)(m, count, x, k, w, first, sums);
            for (int p = 0; p < count; p++)
                for (int r = 0; r < m; r++) NAME(store_sums)(sums[p][r], w, first + p, bias, r, y, out_f32);
        }
        return;
    }
#endif
#pragma omp for schedule(dynamic, 1)
    for (int p = 0; p < panels; p++) {
        const Panel panel = panel_of(w, p);
        T wide[CHUNK * 32] __attribute__((aligned(64)));
        float totals[CHUNK_ROWS * 32], sums[MAX_ROWS * 32];
        for (int r0 = 0; r0 < m; r0 += CHUNK_ROWS) {
            const int rows = m - r0 < CHUNK_ROWS ? m - r0 : CHUNK_ROWS;
            const int tiles = (rows + MAX_ROWS - 1) / MAX_ROWS, tall = (rows + tiles - 1) / tiles;
            for (int k0 = 0; k0 < k; k0 += CHUNK) {
                const int count = k - k0 < CHUNK ? k - k0 : CHUNK;
                NAME(widen)(w, panel, k0, count, wide);
                for (int r = 0; r < rows; r += tall) {
                    const int some = rows - r < tall ? rows - r : tall;
                    float *into = k0 ? sums : totals + r * 32;
                    NAME(wide_tile)(some, x + (int64_t)(r0 + r) * k + k0, k, wide, count, into);
                    if (k0)
                        for (int i = 0; i < some * 32; i++) totals[r * 32 + i] += sums[i];
                }
            }
            for (int r = 0; r < rows; r++) NAME(store_sums)(totals + r * 32, w, p, bias, r0 + r, y, out_f32);
        }
    }
}
void NAME(op_code_product)(const int64_t *a) {
    const Codes w = {.form = INTEGER(3), .k = INTEGER(2), .n = INTEGER(6), .codes = ADDRESS(4), .scale = ADDRESS(5)};
    NAME(code_product)(ADDRESS(0), INTEGER(1), &w, ADDRESS(7), ADDRESS(8), INTEGER(9));
}
