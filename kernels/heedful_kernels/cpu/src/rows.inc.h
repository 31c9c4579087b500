// Ops on single rows: embedding, norms, quantization, rotary embedding with the cache write,
// activations, gathering. A unit is a row.
namespace hk {
namespace {

void read_packed_row(const uint8_t *table, bool is_q4, int k, int n, float *out) {
  const int groups = k / kGroup, lane = n % kTile;
  const int tile_bytes = is_q4 ? packed_q4_tile_bytes(groups) : packed_q8_tile_bytes(groups);
  const uint8_t *tile = table + (size_t)(n / kTile) * tile_bytes;
  for (int g = 0; g < groups; ++g, out += kGroup) {
    float scales[kTile], minima[kTile] = {};
    const uint8_t *lines = is_q4 ? tile + 320 * g : tile + (g >> 1) * 1088 + (g & 1) * 512;
    const uint8_t *scale = is_q4 ? lines + 256 : tile + (g >> 1) * 1088 + 1024 + (g & 1) * 32;
    for (int i = 0; i < kTile; i += W) store(scales + i, load_half((const uint16_t *)scale + i));
    for (int i = 0; is_q4 && i < kTile; i += W) {
      store(minima + i, load_half((const uint16_t *)(lines + 288) + i));
    }
    for (int i = 0; i < kGroup; ++i) {
      const int j = is_q4 ? (i % 16) / 4 : i / 4;
      const uint8_t raw = lines[64 * j + 4 * lane + i % 4];
      const int q = !is_q4 ? (int)raw - 128 : i < 16 ? raw & 15 : raw >> 4;
      out[i] = scales[lane] * (float)q + minima[lane];
    }
  }
}

void embed(const Call &call, int begin, int end) {
  const hk_op &op = *call.op;
  const int h = op.dims[0], format = op.dims[2];
  for (int t = begin; t < end; ++t) {
    const int id = call.batch->token_ids[t];
    float *out = (float *)op.outputs[0] + (size_t)t * h;
    if (format == HK_TABLE_FP32) {
      __builtin_memcpy(out, (const float *)op.inputs[0] + (size_t)id * h, (size_t)h * 4);
    } else if (format == HK_TABLE_BF16) {
      const uint16_t *row = (const uint16_t *)op.inputs[0] + (size_t)id * h;
      for (int i = 0; i < h; ++i) out[i] = bf16_to_float(row[i]);
    } else {
      read_packed_row((const uint8_t *)op.inputs[0], format == HK_TABLE_Q4, h, id, out);
    }
  }
}

void add_position(const Call &call, int begin, int end) {
  const hk_op &op = *call.op;
  const int h = op.dims[0];
  for (int t = begin; t < end; ++t) {
    const float *row = (const float *)op.inputs[0] + (size_t)call.batch->positions[t] * h;
    float *out = (float *)op.outputs[0] + (size_t)t * h;
    for (int i = 0; i < h; ++i) out[i] += row[i];
  }
}

inline float mean_square(const float *x, int n, float mean) {
  vf a = {}, b = {};
  for (int i = 0; i < n; i += 2 * W) {
    vf u = load(x + i) - mean, v = load(x + i + W) - mean;
    a = fma(u, u, a);
    b = fma(v, v, b);
  }
  return reduce_add(a + b) / (float)n;
}

inline float mean_of(const float *x, int n) {
  vf a = {}, b = {};
  for (int i = 0; i < n; i += 2 * W) a += load(x + i), b += load(x + i + W);
  return reduce_add(a + b) / (float)n;
}

void norm_quant(const Call &call, int begin, int end) {
  const hk_op &op = *call.op;
  const int h = op.dims[0];
  const float *weight = (const float *)op.inputs[1], *bias = (const float *)op.inputs[2];
  for (int t = begin; t < end; ++t) {
    const float *x = (const float *)op.inputs[0] + (size_t)t * h;
    const float mean = op.flags & HK_FLAG_CENTERED ? mean_of(x, h) : 0.0f;
    const float inverse = 1.0f / __builtin_sqrtf(mean_square(x, h, mean) + op.params[0]);
    RowOutput out(op, t, h);
    for (int i = 0; i < h; i += kGroup) {
      vf v[kGroup / W];
      for (int j = 0; j < kGroup / W; ++j) {
        const int column = i + j * W;
        v[j] = (load(x + column) - mean) * inverse * load(weight + column);
        if (bias) v[j] += load(bias + column);
      }
      out.put(i, v);
    }
  }
}

void quantize(const Call &call, int begin, int end) {
  const hk_op &op = *call.op;
  const int k = op.dims[0];
  for (int t = begin; t < end; ++t) {
    const float *x = (const float *)op.inputs[0] + (size_t)t * k;
    RowOutput out(op, t, k);
    for (int i = 0; i < k; i += kGroup) {
      vf v[kGroup / W];
      for (int j = 0; j < kGroup / W; ++j) v[j] = load(x + i + j * W);
      out.put(i, v);
    }
  }
}

inline vf sigmoid(vf x) { return 1.0f / (1.0f + exp(-x)); }
inline vf gelu_tanh(vf x) {
  // 0.5 (1 + tanh(z)) is sigmoid(2z).
  return x * sigmoid(1.5957691216f * fma(splat(0.044715f) * x, x * x, x));
}
inline vf gelu(vf x) {
  // Phi(x) through Abramowitz and Stegun 7.1.26: absolute error under 2e-7.
  vf z = x * 0.70710678f, a = (vf)((vi)z & 0x7fffffff);
  vf t = 1.0f / fma(splat(0.3275911f), a, splat(1.0f));
  vf p = splat(1.061405429f);
  p = fma(p, t, splat(-1.453152027f));
  p = fma(p, t, splat(1.421413741f));
  p = fma(p, t, splat(-0.284496736f));
  p = fma(p, t, splat(0.254829592f)) * t;
  vf tail = 0.5f * p * exp(-a * a);
  return x * (x < 0.0f ? tail : 1.0f - tail);
}

inline vf activate(int kind, const float *x, const float *up) {
  vf v = load(x);
  switch (kind) {
    case HK_SWIGLU: return v * sigmoid(v) * load(up);
    case HK_GEGLU_TANH: return gelu_tanh(v) * load(up);
    case HK_GELU: return gelu(v);
    case HK_GELU_TANH: return gelu_tanh(v);
    default: return v < 0.0f ? vf{} : v;
  }
}

void activation(const Call &call, int begin, int end) {
  const hk_op &op = *call.op;
  const int f = op.dims[0], kind = op.dims[1];
  const bool gated = kind == HK_SWIGLU || kind == HK_GEGLU_TANH;
  for (int t = begin; t < end; ++t) {
    const float *x = (const float *)op.inputs[0] + (size_t)t * f * (gated ? 2 : 1);
    RowOutput out(op, t, f);
    for (int i = 0; i < f; i += kGroup) {
      vf v[kGroup / W];
      for (int j = 0; j < kGroup / W; ++j) v[j] = activate(kind, x + i + j * W, x + f + i + j * W);
      out.put(i, v);
    }
  }
}

inline void norm_head(float *x, int d, const float *weight, float eps) {
  vf a = {};
  for (int i = 0; i < d; i += W) a = fma(load(x + i), load(x + i), a);
  const float inverse = 1.0f / __builtin_sqrtf(reduce_add(a) / (float)d + eps);
  for (int i = 0; i < d; i += W) store(x + i, load(x + i) * inverse * load(weight + i));
}

inline void rotate_head(float *__restrict x, int half, const float *__restrict cos,
                        const float *__restrict sin) {
  for (int i = 0; i < half; ++i) {
    const float a = x[i], b = x[i + half];
    x[i] = a * cos[i] - b * sin[i];
    x[i + half] = b * cos[i] + a * sin[i];
  }
}

void rope_kv(const Call &call, int begin, int end) {
  const hk_op &op = *call.op;
  const int hq = op.dims[0], hkv = op.dims[1], d = op.dims[2], half = op.dims[3] / 2;
  const int block_size = op.dims[4], padded = padded_head_dim(d);
  const float *q_norm = (const float *)op.inputs[2], *k_norm = (const float *)op.inputs[3];
  for (int t = begin; t < end; ++t) {
    float *qkv = (float *)op.outputs[0] + (size_t)t * (hq + 2 * hkv) * d;
    const size_t angle = (size_t)call.batch->positions[t] * half;
    for (int h = 0; h < hq + hkv; ++h) {
      float *x = qkv + h * d;
      const float *norm = h < hq ? q_norm : k_norm;
      if (norm) norm_head(x, d, norm, op.params[0]);
      if (half) {
        rotate_head(x, half, (const float *)op.inputs[0] + angle,
                    (const float *)op.inputs[1] + angle);
      }
    }
    const int64_t slot = call.batch->slot_mapping[t];
    if (slot < 0) continue;
    const int64_t block = slot / block_size;
    const int offset = (int)(slot % block_size);
    for (int h = 0; h < hkv; ++h) {
      const float *k = qkv + (hq + h) * d, *v = k + hkv * d;
      const size_t head = (size_t)block * hkv + h;
      uint16_t *keys = (uint16_t *)op.outputs[1] + head * block_size * d +
                       (size_t)(offset / 16) * 16 * d + (offset % 16) * 2;
      for (int i = 0; i < d; i += 2) {
        keys[i * 16] = float_to_bf16(k[i]);
        keys[i * 16 + 1] = float_to_bf16(k[i + 1]);
      }
      uint16_t *values = (uint16_t *)op.outputs[2] + (head * block_size + offset) * padded;
      for (int i = 0; i < d; ++i) values[i] = float_to_bf16(v[i]);
      for (int i = d; i < padded; ++i) values[i] = 0;
    }
  }
}

void gather_rows(const Call &call, int begin, int end) {
  const hk_op &op = *call.op;
  const size_t h = op.dims[0];
  for (int r = begin; r < end; ++r) {
    const size_t row = call.batch->selected_rows[r];
    __builtin_memcpy((float *)op.outputs[0] + r * h, (const float *)op.inputs[0] + row * h, h * 4);
  }
}

}  // namespace
}  // namespace hk
