/* Included by cpu.c once per element type: T, NAME, LOAD, STORE, LOAD16, STORE16 are defined there, and
 * LANES, LOADLANES, MULADD, STEP: what a dot product along a row loads and multiplies at once. */

/* sums[r][0..31] = sum_k x[r][k] * w[k][0..31] for R rows and one panel of 32 outputs. */
INLINE void NAME(product_tile)(const int R, const T *x, int64_t ldx, const T *w, int k, float *sums) {
    v16 acc[MAX_ROWS][2];
#pragma GCC unroll 14
    for (int r = 0; r < R; r++) acc[r][0] = acc[r][1] = splat(0);
    for (int i = 0; i < k; i++) {
        v16 w0 = LOAD16(w + (int64_t)i * 32), w1 = LOAD16(w + (int64_t)i * 32 + 16);
#pragma GCC unroll 14
        for (int r = 0; r < R; r++) {
            float value = LOAD(x + r * ldx + i);
            acc[r][0] += w0 * value;
            acc[r][1] += w1 * value;
        }
    }
#pragma GCC unroll 14
    for (int r = 0; r < R; r++) {
        *(v16 *)(sums + r * 32) = acc[r][0];
        *(v16 *)(sums + r * 32 + 16) = acc[r][1];
    }
}

/* y[m][n] = sum_k x[m][k] * w[n][k] (+ bias[n]): x [m, k], w [panels][k][32], bias [n] float or NULL, y [m, n] of T or
 * float. */
static void NAME(product)(const T *x, int m, int k, const T *w, int n, const float *bias, void *y, int out_f32) {
    const int panels = (n + 31) / 32, tiles = (m + MAX_ROWS - 1) / MAX_ROWS, rows = (m + tiles - 1) / (tiles ? tiles : 1);
#pragma omp for schedule(dynamic, 1)
    for (int p = 0; p < panels; p++)
        for (int first = 0; first < m; first += rows) {
            const T *from = x + (int64_t)first * k, *panel = w + (int64_t)p * k * 32;
            const int count = m - first < rows ? m - first : rows, width = n - p * 32 < 32 ? n - p * 32 : 32;
            float sums[MAX_ROWS * 32];
#define TILE(R) case R: NAME(product_tile)(R, from, k, panel, k, sums); break;
            switch (count) {
                TILE(1) TILE(2) TILE(3)
#if MAX_ROWS > 3
                TILE(4) TILE(5) TILE(6) TILE(7) TILE(8) TILE(9) TILE(10) TILE(11) TILE(12) TILE(13) TILE(14)
#endif
            }
#undef TILE
            for (int r = 0; r < count; r++) {
                const int64_t start = (int64_t)(first + r) * n + p * 32;
                for (int c = 0; c < width; c++) {
                    float sum = sums[r * 32 + c] + (bias ? bias[p * 32 + c] : 0.0f);
                    if (out_f32) ((float *)y)[start + c] = sum;
                    else STORE((T *)y + start + c, sum);
                }
            }
        }
}
void NAME(op_product)(const int64_t *a) {
    NAME(product)(ADDRESS(0), INTEGER(1), INTEGER(2), ADDRESS(3), INTEGER(4), ADDRESS(5), ADDRESS(6), INTEGER(7));
}

/* residual [rows, n] float += delta [rows, n] (may be NULL); out = residual / rms(residual) * weight [n]. */
static void NAME(add_rms_norm)(float *residual, const T *delta, const float *weight, T *out, int rows, int n, float eps) {
#pragma omp for schedule(static)
    for (int r = 0; r < rows; r++) {
        float *h = residual + (int64_t)r * n;
        const T *d = delta ? delta + (int64_t)r * n : NULL;
        T *o = out + (int64_t)r * n;
        v16 squares = splat(0);
        float tail = 0;
        int i = 0;
        for (; i + 16 <= n; i += 16) {
            v16 v = *(v16 *)(h + i);
            if (d) *(v16 *)(h + i) = v = v + LOAD16(d + i);
            squares += v * v;
        }
        for (; i < n; i++) {
            if (d) h[i] += LOAD(d + i);
            tail += h[i] * h[i];
        }
        float scale = 1.0f / sqrtf((sum16(squares) + tail) / n + eps);
        for (i = 0; i + 16 <= n; i += 16) STORE16(o + i, *(v16 *)(h + i) * scale * *(const v16 *)(weight + i));
        for (; i < n; i++) STORE(o + i, h[i] * scale * weight[i]);
    }
}
void NAME(op_add_rms_norm)(const int64_t *a) {
    NAME(add_rms_norm)(ADDRESS(0), ADDRESS(1), ADDRESS(2), ADDRESS(3), INTEGER(4), INTEGER(5), REAL(6));
}

/* As add_rms_norm, but the mean is taken off first and a bias [n] added last. */
static void NAME(add_layer_norm)(float *residual, const T *delta, const float *weight, const float *bias, T *out, int rows,
                                 int n, float eps) {
#pragma omp for schedule(static)
    for (int r = 0; r < rows; r++) {
        float *h = residual + (int64_t)r * n;
        const T *d = delta ? delta + (int64_t)r * n : NULL;
        T *o = out + (int64_t)r * n;
        v16 sums = splat(0), squares = splat(0);
        float sum = 0, square = 0;
        int i = 0;
        for (; i + 16 <= n; i += 16) {
            if (d) *(v16 *)(h + i) += LOAD16(d + i);
            sums += *(v16 *)(h + i);
        }
        for (; i < n; i++) {
            if (d) h[i] += LOAD(d + i);
            sum += h[i];
        }
        const float mean = (sum16(sums) + sum) / n;
        for (i = 0; i + 16 <= n; i += 16) {
            v16 x = *(v16 *)(h + i) - mean;
            squares += x * x;
        }
        for (; i < n; i++) square += (h[i] - mean) * (h[i] - mean);
        const float scale = 1.0f / sqrtf((sum16(squares) + square) / n + eps);
        for (i = 0; i + 16 <= n; i += 16)
            STORE16(o + i, (*(v16 *)(h + i) - mean) * scale * *(const v16 *)(weight + i) + *(const v16 *)(bias + i));
        for (; i < n; i++) STORE(o + i, (h[i] - mean) * scale * weight[i] + bias[i]);
    }
}
void NAME(op_add_layer_norm)(const int64_t *a) {
    NAME(add_layer_norm)(ADDRESS(0), ADDRESS(1), ADDRESS(2), ADDRESS(3), ADDRESS(4), INTEGER(5), INTEGER(6), REAL(7));
}

/* In place, `count` vectors of n in each row: x = x / rms(x) * weight [n]. Rows are `stride` apart. */
static void NAME(rms_norm)(T *x, int rows, int64_t stride, int count, int n, const float *weight, float eps) {
#pragma omp for schedule(static)
    for (int v = 0; v < rows * count; v++) {
        T *p = x + v / count * stride + (int64_t)(v % count) * n;
        v16 squares = splat(0);
        float tail = 0;
        int i = 0;
        for (; i + 16 <= n; i += 16) squares += LOAD16(p + i) * LOAD16(p + i);
        for (; i < n; i++) tail += LOAD(p + i) * LOAD(p + i);
        const float scale = 1.0f / sqrtf((sum16(squares) + tail) / n + eps);
        for (i = 0; i + 16 <= n; i += 16) STORE16(p + i, LOAD16(p + i) * scale * *(const v16 *)(weight + i));
        for (; i < n; i++) STORE(p + i, LOAD(p + i) * scale * weight[i]);
    }
}
void NAME(op_rms_norm)(const int64_t *a) {
    NAME(rms_norm)(ADDRESS(0), INTEGER(1), a[2], INTEGER(3), INTEGER(4), ADDRESS(5), REAL(6));
}

/* x [rows, n] += y */
static void NAME(add)(T *x, const T *y, int rows, int n) {
#pragma omp for schedule(static)
    for (int r = 0; r < rows; r++) {
        T *p = x + (int64_t)r * n;
        const T *q = y + (int64_t)r * n;
        int i = 0;
        for (; i + 16 <= n; i += 16) STORE16(p + i, LOAD16(p + i) + LOAD16(q + i));
        for (; i < n; i++) STORE(p + i, LOAD(p + i) + LOAD(q + i));
    }
}
void NAME(op_add)(const int64_t *a) { NAME(add)(ADDRESS(0), ADDRESS(1), INTEGER(2), INTEGER(3)); }

/* out [rows, n] = gelu(x), in its form with tanh; gated: x [rows, 2n], the second half is multiplied. */
static void NAME(gelu)(const T *x, T *out, int rows, int n, int gated) {
    const float c = 0.7978845608028654f; /* sqrt(2 / pi) */
#pragma omp for schedule(static)
    for (int r = 0; r < rows; r++) {
        const T *g = x + (int64_t)r * (gated ? 2 * n : n), *u = g + n;
        T *o = out + (int64_t)r * n;
        int i = 0;
        for (; i + 16 <= n; i += 16) {
            v16 v = LOAD16(g + i), y = v * 0.5f * (tanh16((v + v * v * v * 0.044715f) * c) + 1.0f);
            STORE16(o + i, gated ? y * LOAD16(u + i) : y);
        }
        for (; i < n; i++) {
            float v = LOAD(g + i), y = 0.5f * v * (1.0f + tanhf(c * (v + 0.044715f * v * v * v)));
            STORE(o + i, gated ? y * LOAD(u + i) : y);
        }
    }
}
void NAME(op_gelu)(const int64_t *a) { NAME(gelu)(ADDRESS(0), ADDRESS(1), INTEGER(2), INTEGER(3), INTEGER(4)); }

/* gate_up [rows, 2n] -> out [rows, n] = silu(gate) * up. */
static void NAME(silu_mul)(const T *gate_up, T *out, int rows, int n) {
#pragma omp for schedule(static)
    for (int r = 0; r < rows; r++) {
        const T *g = gate_up + (int64_t)r * 2 * n, *u = g + n;
        T *o = out + (int64_t)r * n;
        int i = 0;
        for (; i + 16 <= n; i += 16) {
            v16 x = LOAD16(g + i);
            STORE16(o + i, x / (exp16(-x) + 1.0f) * LOAD16(u + i));
        }
        for (; i < n; i++) {
            float x = LOAD(g + i);
            STORE(o + i, x / (1.0f + expf(-x)) * LOAD(u + i));
        }
    }
}
void NAME(op_silu_mul)(const int64_t *a) { NAME(silu_mul)(ADDRESS(0), ADDRESS(1), INTEGER(2), INTEGER(3)); }

/* Rotates q and k of qkv [rows, (heads + 2 kv_heads) * dim] (rotate-half layout; cos, sin [max_position, rotary / 2]: the first `rotary` of a head),
 * leaves q there, and writes k and v into the pages: k_cache [blocks, kv_heads, dim, BLOCK] (keys as columns),
 * v_cache [blocks, kv_heads, BLOCK, dim]. kv_slot[row] = block * BLOCK + offset. */
static void NAME(rope_store)(T *qkv, const Batch *batch, const float *cosine, const float *sine, T *k_cache, T *v_cache,
                             int heads, int kv_heads, int dim, int rotary) {
    const int half = rotary / 2;
    const int32_t *position = batch->position, *kv_slot = batch->kv_slot;
#pragma omp for schedule(static)
    for (int r = 0; r < (int)batch->rows; r++) {
        T *q = qkv + (int64_t)r * (heads + 2 * kv_heads) * dim, *k = q + (int64_t)heads * dim, *v = k + (int64_t)kv_heads * dim;
        const float *c = cosine + (int64_t)position[r] * half, *s = sine + (int64_t)position[r] * half;
        for (int h = 0; h < heads + kv_heads; h++) {
            T *x = q + (int64_t)h * dim;
            for (int i = 0; i < half; i++) {
                float a = LOAD(x + i), b = LOAD(x + half + i);
                STORE(x + i, a * c[i] - b * s[i]);
                STORE(x + half + i, b * c[i] + a * s[i]);
            }
        }
        int64_t block = kv_slot[r] / BLOCK, offset = kv_slot[r] % BLOCK;
        for (int h = 0; h < kv_heads; h++) {
            T *kd = k_cache + (block * kv_heads + h) * dim * BLOCK + offset;
            for (int i = 0; i < dim; i++) kd[(int64_t)i * BLOCK] = k[(int64_t)h * dim + i];
            memcpy(v_cache + ((block * kv_heads + h) * BLOCK + offset) * dim, v + (int64_t)h * dim, dim * sizeof(T));
        }
    }
}
void NAME(op_rope_store)(const int64_t *a) {
    NAME(rope_store)(ADDRESS(0), ADDRESS(1), ADDRESS(2), ADDRESS(3), ADDRESS(4), ADDRESS(5), INTEGER(6), INTEGER(7), INTEGER(8),
                     INTEGER(9));
}

/* Scores of R query rows against one block of keys, and their weighted sum of one block of values. */
INLINE void NAME(scores)(const int R, const float *q, int dim, const T *k, float *out, int64_t stride) {
    v16 acc[6];
#pragma GCC unroll 6
    for (int r = 0; r < R; r++) acc[r] = splat(0);
    for (int d = 0; d < dim; d++) {
        v16 key = LOAD16(k + (int64_t)d * BLOCK);
#pragma GCC unroll 6
        for (int r = 0; r < R; r++) acc[r] += key * q[r * dim + d];
    }
#pragma GCC unroll 6
    for (int r = 0; r < R; r++) *(v16 *)(out + r * stride) = acc[r];
}

INLINE void NAME(weigh)(const int R, const float *p, int64_t stride, int keys, const T *v, int dim, int d0, v16 acc[6][4]) {
    for (int j = 0; j < keys; j++) {
        v16 x[4];
#pragma GCC unroll 4
        for (int c = 0; c < 4; c++) x[c] = d0 + c * 16 < dim ? LOAD16(v + (int64_t)j * dim + d0 + c * 16) : splat(0);
#pragma GCC unroll 6
        for (int r = 0; r < R; r++)
#pragma GCC unroll 4
            for (int c = 0; c < 4; c++) acc[r][c] += x[c] * p[r * stride + j];
    }
}

/* One tile: R (position, head) rows that share a kv head. first/last: the block range any row sees. */
INLINE void NAME(attend)(const int R, const T **query, T **out, const int *lower, const int *upper, const int32_t *table,
                         const T *k_cache, const T *v_cache, int kv_heads, int kv_head, int dim, float scale, float softcap,
                         float *buffer, int64_t stride) {
    float q[6 * 256], sum[6];
    int begin = lower[0], end = upper[0];
    for (int r = 0; r < R; r++) {
        if (lower[r] < begin) begin = lower[r];
        if (upper[r] > end) end = upper[r];
        for (int d = 0; d < dim; d++) q[r * dim + d] = LOAD(query[r] + d) * scale;
    }
    const int first = begin / BLOCK, blocks = (end + BLOCK - 1) / BLOCK;
    const int64_t page = (int64_t)dim * BLOCK;
    for (int b = first; b < blocks; b++) {
        /* Pages lie anywhere, so the hardware cannot guess the next one. */
        if (b + 1 < blocks) prefetch(k_cache + ((int64_t)table[b + 1] * kv_heads + kv_head) * page, page * sizeof(T));
        NAME(scores)(R, q, dim, k_cache + ((int64_t)table[b] * kv_heads + kv_head) * page, buffer + (b - first) * BLOCK, stride);
    }
    const int width = (blocks - first) * BLOCK, base = first * BLOCK;
    for (int r = 0; r < R; r++) {
        float *s = buffer + r * stride;
        if (softcap > 0)
            for (int i = 0; i < width; i += 16) *(v16 *)(s + i) = tanh16(*(v16 *)(s + i) / softcap) * softcap;
        for (int i = 0; i < lower[r] - base; i++) s[i] = -INFINITY;
        for (int i = upper[r] - base; i < width; i++) s[i] = -INFINITY;
        v16 top = splat(-INFINITY), total = splat(0);
        for (int i = 0; i < width; i += 16) top = max16(top, *(v16 *)(s + i));
        float peak = top[0];
        for (int i = 1; i < 16; i++) peak = top[i] > peak ? top[i] : peak;
        for (int i = 0; i < width; i += 16) {
            v16 x = *(v16 *)(s + i), e = exp16(x - peak);
            e = pick16((i16)(x == splat(-INFINITY)), splat(0), e);
            *(v16 *)(s + i) = e;
            total += e;
        }
        sum[r] = sum16(total);
    }
    for (int d0 = 0; d0 < dim; d0 += 64) {
        v16 acc[6][4];
#pragma GCC unroll 6
        for (int r = 0; r < R; r++)
#pragma GCC unroll 4
            for (int c = 0; c < 4; c++) acc[r][c] = splat(0);
        for (int b = first; b < blocks; b++) {
            int keys = end - b * BLOCK < BLOCK ? end - b * BLOCK : BLOCK;
            if (b + 1 < blocks) prefetch(v_cache + ((int64_t)table[b + 1] * kv_heads + kv_head) * page, page * sizeof(T));
            NAME(weigh)(R, buffer + (b - first) * BLOCK, stride, keys,
                        v_cache + ((int64_t)table[b] * kv_heads + kv_head) * page, dim, d0, acc);
        }
#pragma GCC unroll 6
        for (int r = 0; r < R; r++)
#pragma GCC unroll 4
            for (int c = 0; c < 4; c++)
                if (d0 + c * 16 < dim) STORE16(out[r] + d0 + c * 16, acc[r][c] / sum[r]);
    }
}

/* Paged causal attention of a mixed batch. Sequence s owns rows query_start[s] .. query_start[s+1] of qkv and out
 * [rows, heads * dim]; its keys are positions 0 .. context[s]-1 in the blocks of tables[s], its last row the last of
 * them. window > 0: a position sees only that many, itself included. dim a multiple of 16, at most 256. */
static void NAME(attention)(const T *qkv, T *out, const T *k_cache, const T *v_cache, const Batch *batch, int heads,
                            int kv_heads, int dim, float scale, int window, float softcap) {
    const int32_t *query_start = batch->query_start, *context = batch->context;
    const int sequences = (int)batch->sequences;
    const int group = heads / kv_heads, positions = group >= 6 ? 1 : 6 / group;
    const int64_t width = (int64_t)(heads + 2 * kv_heads) * dim, stride = (batch->max_context + 2 * BLOCK) / BLOCK * BLOCK;
    int *tile_start = malloc(sizeof(int) * (sequences + 1));
    tile_start[0] = 0;
    for (int s = 0; s < sequences; s++)
        tile_start[s + 1] = tile_start[s] + (query_start[s + 1] - query_start[s] + positions - 1) / positions;
    const int tiles = tile_start[sequences] * kv_heads;
    float *buffer = aligned_alloc(64, sizeof(float) * 6 * stride);
#pragma omp for schedule(dynamic, 2)
    for (int t = 0; t < tiles; t++) {
        int tile = t / kv_heads, kv_head = t % kv_heads, low = 0, high = sequences;
        while (high - low > 1) {
            int middle = (low + high) / 2;
            if (tile_start[middle] <= tile) low = middle; else high = middle;
        }
        int s = low, row = query_start[s] + (tile - tile_start[s]) * positions, stop = row + positions;
        if (stop > query_start[s + 1]) stop = query_start[s + 1];
        const T *query[6];
        T *target[6];
        int lower[6], upper[6], count = 0;
        for (int r = row; r < stop; r++) {
            int seen = context[s] - (query_start[s + 1] - 1 - r);
            for (int g = 0; g < group; g++) {
                int head = kv_head * group + g;
                query[count] = qkv + r * width + (int64_t)head * dim;
                target[count] = out + ((int64_t)r * heads + head) * dim;
                upper[count] = seen;
                lower[count] = window > 0 && seen > window ? seen - window : 0;
                if (++count == 6 || (g == group - 1 && r == stop - 1)) {
#define ATTEND(R) \
    case R: NAME(attend)(R, query, target, lower, upper, batch->tables + s * batch->table_width, k_cache, v_cache, kv_heads, \
                     kv_head, dim, scale, softcap, buffer, stride); break;
                    switch (count) { ATTEND(1) ATTEND(2) ATTEND(3) ATTEND(4) ATTEND(5) ATTEND(6) }
#undef ATTEND
                    count = 0;
                }
            }
        }
    }
    free(buffer);
    free(tile_start);
}
void NAME(op_attention)(const int64_t *a) {
    NAME(attention)(ADDRESS(0), ADDRESS(1), ADDRESS(2), ADDRESS(3), ADDRESS(4), INTEGER(5), INTEGER(6), INTEGER(7), REAL(8),
                    INTEGER(9), REAL(10));
}

/* s[row][j] = sum_i x[row][i] * a[j][i] for R rows, N of the rank's rows. STEP values enter a lane at once. */
INLINE void NAME(shrink)(const int R, const int N, const T *x, int64_t ldx, const T *a, int in, float *s, int64_t lds) {
    v16 acc[4][4];
    float tail[4][4];
#pragma GCC unroll 4
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int j = 0; j < N; j++) acc[r][j] = splat(0), tail[r][j] = 0;
    int i = 0;
    for (; i + 16 * STEP <= in; i += 16 * STEP) {
        LANES w[4];
#pragma GCC unroll 4
        for (int j = 0; j < N; j++) w[j] = LOADLANES(a + (int64_t)j * in + i);
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) {
            LANES v = LOADLANES(x + r * ldx + i);
#pragma GCC unroll 4
            for (int j = 0; j < N; j++) acc[r][j] = MULADD(acc[r][j], v, w[j]);
        }
    }
    for (; i < in; i++)
        for (int r = 0; r < R; r++)
            for (int j = 0; j < N; j++) tail[r][j] += LOAD(x + r * ldx + i) * LOAD(a + (int64_t)j * in + i);
#pragma GCC unroll 4
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int j = 0; j < N; j++) s[r * lds + j] = sum16(acc[r][j]) + tail[r][j];
}

/* y[row][o] += sum_j s[row][j] * b[j][o] for R rows; b is B transposed, with the scaling in it.
 * AFFINE: y is first multiplied by affine[o], then affine[n + o] is added. */
INLINE void NAME(expand)(const int R, const int AFFINE, const float *s, int64_t lds, int rank, const T *b, int n,
                         const float *affine, T *y, int64_t ldy) {
    int o = 0;
    for (; o + 64 <= n; o += 64) {
        v16 acc[4][4];
#pragma GCC unroll 4
        for (int r = 0; r < R; r++)
#pragma GCC unroll 4
            for (int c = 0; c < 4; c++) acc[r][c] = splat(0);
        for (int j = 0; j < rank; j++) {
            v16 w[4];
#pragma GCC unroll 4
            for (int c = 0; c < 4; c++) w[c] = LOAD16(b + (int64_t)j * n + o + c * 16);
#pragma GCC unroll 4
            for (int r = 0; r < R; r++)
#pragma GCC unroll 4
                for (int c = 0; c < 4; c++) acc[r][c] += w[c] * s[r * lds + j];
        }
#pragma GCC unroll 4
        for (int r = 0; r < R; r++)
#pragma GCC unroll 4
            for (int c = 0; c < 4; c++) {
                T *out = y + r * ldy + o + c * 16;
                v16 base = LOAD16(out);
                if (AFFINE) base = base * *(const v16 *)(affine + o + c * 16) + *(const v16 *)(affine + n + o + c * 16);
                STORE16(out, base + acc[r][c]);
            }
    }
    for (; o < n; o++)
        for (int r = 0; r < R; r++) {
            float total = 0;
            for (int j = 0; j < rank; j++) total += s[r * lds + j] * LOAD(b + (int64_t)j * n + o);
            float base = LOAD(y + r * ldy + o);
            if (AFFINE) base = base * affine[o] + affine[n + o];
            STORE(y + r * ldy + o, base + total);
        }
}

/* Adds the LoRA deltas of a mixed batch to the slices of a fused projection:
 * y[row, slice] = y[row, slice] * scale + bias + B(A x[row]), where scale and bias are 1 and 0 but for DoRA and biases.
 * Segment g: rows seg_start[g] .. seg_end[g] all use adapter slot seg_slot[g]. Tables are [slots, slices]: address of
 * A [rank, in], of B transposed and scaled [rank, slice_size], the rank (0: no delta), and the address of scale and
 * bias, float [2, slice_size] (0: neither). */
static void NAME(lora)(const T *x, int in, T *y, int64_t ldy, const Batch *batch, int slices, const int32_t *slice_offset,
                       const int32_t *slice_size, const int64_t *a_table, const int64_t *b_table, const int32_t *rank_table,
                       const int64_t *affine_table) {
    const int32_t *seg_slot = batch->seg_slot, *seg_start = batch->seg_start, *seg_end = batch->seg_end;
    const int segments = (int)batch->segments;
    enum { ROWS = 32 };
    int *tile_start = malloc(sizeof(int) * (segments + 1));
    tile_start[0] = 0;
    for (int g = 0; g < segments; g++) tile_start[g + 1] = tile_start[g] + (seg_end[g] - seg_start[g] + ROWS - 1) / ROWS;
    const int tasks = tile_start[segments] * slices;
#pragma omp for schedule(dynamic, 1)
    for (int task = 0; task < tasks; task++) {
        int tile = task / slices, slice = task % slices, g = 0;
        while (tile_start[g + 1] <= tile) g++;
        int entry = seg_slot[g] * slices + slice, rank = rank_table[entry];
        const float *affine = (const float *)(intptr_t)affine_table[entry];
        if (!rank && !affine) continue;
        const T *a = (const T *)(intptr_t)a_table[entry], *b = (const T *)(intptr_t)b_table[entry];
        int row = seg_start[g] + (tile - tile_start[g]) * ROWS, stop = row + ROWS < seg_end[g] ? row + ROWS : seg_end[g];
        float s[4 * MAX_RANK];
        for (; row < stop; row += 4) {
            int rows = stop - row < 4 ? stop - row : 4, j = 0;
            const T *in_row = x + (int64_t)row * in;
#define SHRINK(R, N) case R: NAME(shrink)(R, N, in_row, in, a + (int64_t)j * in, in, s + j, MAX_RANK); break;
            for (; j + 4 <= rank; j += 4) switch (rows) { SHRINK(1, 4) SHRINK(2, 4) SHRINK(3, 4) SHRINK(4, 4) }
            for (; j < rank; j++) switch (rows) { SHRINK(1, 1) SHRINK(2, 1) SHRINK(3, 1) SHRINK(4, 1) }
#undef SHRINK
            T *out_row = y + row * ldy + slice_offset[slice];
#define EXPAND(R, AFFINE) case R: NAME(expand)(R, AFFINE, s, MAX_RANK, rank, b, slice_size[slice], affine, out_row, ldy); break;
            if (affine) switch (rows) { EXPAND(1, 1) EXPAND(2, 1) EXPAND(3, 1) EXPAND(4, 1) }
            else switch (rows) { EXPAND(1, 0) EXPAND(2, 0) EXPAND(3, 0) EXPAND(4, 0) }
#undef EXPAND
        }
    }
    free(tile_start);
}
void NAME(op_lora)(const int64_t *a) {
    NAME(lora)(ADDRESS(0), INTEGER(1), ADDRESS(2), a[3], ADDRESS(4), INTEGER(5), ADDRESS(6), ADDRESS(7), ADDRESS(8), ADDRESS(9),
               ADDRESS(10), ADDRESS(11));
}

#include "quant.c"

#undef T
#undef NAME
#undef LOAD
#undef STORE
#undef LOAD16
#undef STORE16
#undef LANES
#undef LOADLANES
#undef MULADD
#undef STEP
