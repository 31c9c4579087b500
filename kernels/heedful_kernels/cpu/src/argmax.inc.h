// Greedy token and normaliser of each row of logits. A unit of the first stage is a fixed stretch of
// one row, one of the second combines a row's stretches in order.
namespace hk {
namespace {

constexpr int kArgmaxPartial = 4;  // max, sum of exp(x - max), argmax as bits, NaN seen

void argmax_partial(const Call &call, int begin, int end) {
  const int v = call.op->dims[0], splits = ceil_div(v, kVocabSplit);
  const float infinity = __builtin_inff();
  for (int unit = begin; unit < end; ++unit) {
    const int row = unit / splits, first = (unit % splits) * kVocabSplit;
    const int n = min_int(kVocabSplit, v - first), whole = n / W * W;
    const float *x = (const float *)call.op->inputs[0] + (size_t)row * v + first;
    float tail[W];
    for (int i = 0; i < W; ++i) tail[i] = whole + i < n ? x[whole + i] : -infinity;
    const vf rest = load(tail);
    vf top = rest;
    vi bad = rest != rest;
    for (int i = 0; i < whole; i += W) {
      vf u = load(x + i);
      top = max(u, top);
      bad |= u != u;
    }
    const float best = reduce_max(top);
    // With a best of -inf every x - best is NaN; the stretch then weighs nothing.
    const float base = best == -infinity ? 0.0f : best;
    vf sum = exp(rest - base);
    for (int i = 0; i < whole; i += W) sum += exp(load(x + i) - base);
    int at = 0;
    while (at < n && !(x[at] == best)) ++at;
    float *out = call.shared_scratch + (size_t)unit * kArgmaxPartial;
    out[0] = best;
    out[1] = reduce_add(sum);
    const int32_t id = first + at;
    __builtin_memcpy(out + 2, &id, 4);
    out[3] = reduce_add_int(bad) ? 1.0f : 0.0f;
  }
}

void argmax_combine(const Call &call, int begin, int end) {
  const int splits = ceil_div(call.op->dims[0], kVocabSplit);
  for (int row = begin; row < end; ++row) {
    const float *parts = call.shared_scratch + (size_t)row * splits * kArgmaxPartial;
    const float *winner = parts;
    bool bad = false;
    for (int i = 0; i < splits; ++i) {
      const float *part = parts + i * kArgmaxPartial;
      bad |= part[3] != 0.0f;
      if (part[0] > winner[0]) winner = part;
    }
    const float best = winner[0], infinity = __builtin_inff();
    float sum = 0.0f;
    for (int i = 0; i < splits; ++i) {
      const float *part = parts + i * kArgmaxPartial;
      if (part[0] > -infinity) sum += part[1] * __builtin_expf(part[0] - best);
    }
    int32_t id;
    __builtin_memcpy(&id, winner + 2, 4);
    const bool finite = best < infinity && best > -infinity;
    const float lse = finite ? best + __builtin_logf(sum) : best;
    ((int32_t *)call.op->outputs[0])[row] = bad ? -1 : id;
    ((float *)call.op->outputs[1])[row] = bad ? __builtin_nanf("") : best;
    ((float *)call.op->outputs[2])[row] = bad ? __builtin_nanf("") : lse;
  }
}

}  // namespace
}  // namespace hk
