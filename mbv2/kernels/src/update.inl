// The optimizer's rules, value by value. What they are and where they come from: mbv2/training/optimizer.py.

// Plain loops: the compiler turns them into vectors, and sizes need not be multiples of anything.
void update(const Update& u, float* w, const float* g, float* m, float* s, int64_t begin, int64_t end) {
  const Update c = u;  // by value: what is stored could else have changed it
  if (c.rule == Rule::kSgd) {
#pragma GCC ivdep
    for (int64_t i = begin; i < end; ++i) {
      m[i] = c.first * m[i] + (g[i] + c.decay * w[i]);
      w[i] -= c.rate * m[i];
    }
  } else if (c.rule == Rule::kNesterov) {
#pragma GCC ivdep
    for (int64_t i = begin; i < end; ++i) {
      const float total = g[i] + c.decay * w[i];
      m[i] = c.first * m[i] + total;
      w[i] -= c.rate * (total + c.first * m[i]);
    }
  } else if (c.rule == Rule::kAdamw) {
#pragma GCC ivdep
    for (int64_t i = begin; i < end; ++i) {
      m[i] = c.first * m[i] + c.rest_of_first * g[i];
      s[i] = c.second * s[i] + c.rest_of_second * g[i] * g[i];
      const float change = (m[i] / c.mean_correction) / (__builtin_sqrtf(s[i] / c.square_correction) + c.epsilon);
      w[i] -= c.rate * (change + c.decay * w[i]);
    }
  } else {
#pragma GCC ivdep
    for (int64_t i = begin; i < end; ++i) {
      const float total = g[i] + c.decay * w[i];
      s[i] = c.second * s[i] + c.rest_of_second * total * total;
      m[i] = c.first * m[i] + c.rate * total / __builtin_sqrtf(s[i] + c.epsilon);
      w[i] -= m[i];
    }
  }
}
