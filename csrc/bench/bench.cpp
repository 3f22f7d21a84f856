// How fast every kernel is that this processor can run: one thread, its own processor time.
//
//   qnb_bench [part of an op's or instruction set's name ...]
//
// Walks some shapes, for each the ops of include/qnb.h, and for each the instruction sets whose kernels answer for it.
// It sets the ceiling itself, so that QNB_ISA limits nothing here: name what is wanted.
// A time is the median of batches of calls that fill a fifth of a second. Batches, because a virtual machine corrects a
// process's time afterwards by what its host took: a single short call may seem to take none. For the same reason the
// shortest batch would flatter.
// Products are given in GMAC/s, and at few rows, where reading the weight is all that takes time, that is GB/s of
// weights times the rows; the other ops in GB/s, read and written.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <functional>
#include <new>
#include <string>
#include <vector>

#include "../include/qnb.h"

namespace {

constexpr double seconds_per_case = 0.2;
constexpr double seconds_per_batch = 0.005;

// Processor time of this process, in seconds: a busy neighbour does not count.
double now() {
#if defined(CLOCK_PROCESS_CPUTIME_ID)
  timespec t;
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
#else
  return static_cast<double>(std::clock()) / CLOCKS_PER_SEC;
#endif
}

// Of one call.
double median_seconds(const std::function<int32_t()>& call) {
  const auto batch = [&](int64_t calls) {
    const double begin = now();
    for (int64_t i = 0; i < calls; ++i) {
      if (const int32_t error = call(); error != QNB_OK) {
        std::fprintf(stderr, "qnb_bench: %s\n", qnb_error_text(error));
        std::exit(1);
      }
    }
    return now() - begin;
  };
  int64_t calls = 1;
  while (batch(calls) < seconds_per_batch) calls *= 2;
  std::vector<double> times;
  const double start = now();
  do {
    times.push_back(batch(calls) / static_cast<double>(calls));
  } while (times.size() < 3 || now() - start < seconds_per_case);
  std::nth_element(times.begin(), times.begin() + static_cast<int64_t>(times.size() / 2), times.end());
  return times[times.size() / 2];
}

// An array at a multiple of 64 bytes, as torch's are. Its first touch lies before any measurement.
template <class T>
class Array {
 public:
  explicit Array(int64_t count)
      : data_(static_cast<T*>(::operator new(static_cast<size_t>(count) * sizeof(T), std::align_val_t{64}))) {
    std::memset(static_cast<void*>(data_), 0, static_cast<size_t>(count) * sizeof(T));
  }
  ~Array() { ::operator delete(data_, std::align_val_t{64}); }
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;
  T* get() { return data_; }
  T& operator[](int64_t i) { return data_[i]; }

 private:
  T* data_;
};

struct Shape {
  int64_t M, N, K;
};

constexpr int64_t group = 64;  // k of a scale, where codes have groups

// What one op needs for one shape, and how much it does.
struct Case {
  const char* op;
  int32_t bits;  // of codes; 0 where the op says it
  Shape shape;
  double work;  // MAC or bytes
  const char* unit;
};

// The arrays of a shape, filled once and used by all ops.
struct Arrays {
  Array<float> x, row_scale, weight_scale, out;
  Array<int8_t> codes, plain, packed;
  Array<uint8_t> plain_codes, packed_codes;  // room for 8 bits
  Array<float> group_scale;

  explicit Arrays(const Shape& s)
      : x(s.M * s.K),
        row_scale(s.M),
        weight_scale(s.N),
        out(s.M * s.N),
        codes(s.M * s.K),
        plain(s.N * s.K),
        packed(qnb_packed_w8_bytes(s.N, s.K)),
        plain_codes(s.N * s.K),
        packed_codes(qnb_packed_codes_bytes(s.N, s.K, 8)),
        group_scale(s.N * (s.K / group)) {
    uint32_t state = 1;
    const auto next = [&] { return static_cast<int8_t>((state = state * 1664525u + 1013904223u) >> 24); };
    for (int64_t i = 0; i < s.M * s.K; ++i) {
      codes[i] = next();
      x[i] = 0.01f * static_cast<float>(codes[i]);
    }
    for (int64_t i = 0; i < s.N * s.K; ++i) plain[i] = next();
    for (int64_t m = 0; m < s.M; ++m) row_scale[m] = 0.01f;
    for (int64_t n = 0; n < s.N; ++n) weight_scale[n] = 0.01f;
    for (int64_t i = 0; i < s.N * (s.K / group); ++i) group_scale[i] = 0.01f;
    qnb_pack_w8(plain.get(), s.N, s.K, packed.get(), nullptr);
  }
};

double seconds_of(const std::string& op, int32_t bits, const Shape& s, Arrays& a) {
  if (op == "quantize_rows") {
    return median_seconds([&] {
      return qnb_quantize_rows(a.x.get(), QNB_F32, nullptr, s.M, s.K, a.codes.get(), a.row_scale.get(), nullptr);
    });
  }
  if (op == "quantize_rows_static") {
    return median_seconds([&] {
      return qnb_quantize_rows_static(a.x.get(), QNB_F32, nullptr, 0.01f, 3, s.M, s.K, a.codes.get(),
                                      a.row_scale.get(), nullptr);
    });
  }
  if (op == "pack_w8") {
    return median_seconds([&] { return qnb_pack_w8(a.plain.get(), s.N, s.K, a.packed.get(), nullptr); });
  }
  if (op == "unpack_w8") {
    return median_seconds([&] { return qnb_unpack_w8(a.packed.get(), s.N, s.K, a.plain.get(), nullptr); });
  }
  if (bits > 0) {
    const auto mask = static_cast<uint8_t>((1 << bits) - 1);
    for (int64_t i = 0; i < s.N * s.K; ++i) a.plain_codes[i] = static_cast<uint8_t>(a.plain[i]) & mask;
    qnb_pack_codes(a.plain_codes.get(), s.N, s.K, bits, a.packed_codes.get(), nullptr);
    if (op == "pack_codes") {
      return median_seconds(
          [&] { return qnb_pack_codes(a.plain_codes.get(), s.N, s.K, bits, a.packed_codes.get(), nullptr); });
    }
    if (op == "unpack_codes") {
      return median_seconds(
          [&] { return qnb_unpack_codes(a.packed_codes.get(), s.N, s.K, bits, a.plain_codes.get(), nullptr); });
    }
    const int64_t bytes = op == "linear_codes" ? qnb_linear_codes_workspace_bytes(s.M, s.N, s.K, 1)
                                               : qnb_linear_codes_a8_workspace_bytes(s.M, s.N, s.K, 1);
    Array<char> workspace(bytes);
    return median_seconds([&] {
      if (op == "linear_codes") {
        return qnb_linear_codes(a.x.get(), QNB_F32, nullptr, a.packed_codes.get(), bits, group, a.group_scale.get(),
                                nullptr, nullptr, nullptr, QNB_F32, s.M, s.N, s.K, a.out.get(), QNB_F32,
                                workspace.get(), bytes, nullptr);
      }
      return qnb_linear_codes_a8(a.x.get(), QNB_F32, nullptr, a.packed_codes.get(), bits, group, a.group_scale.get(),
                                 nullptr, QNB_F32, s.M, s.N, s.K, a.out.get(), QNB_F32, workspace.get(), bytes,
                                 nullptr);
    });
  }
  const int64_t bytes = op == "gemm_w8a8"     ? qnb_gemm_w8a8_workspace_bytes(s.M, s.N, s.K, 1)
                        : op == "linear_w8a8" ? qnb_linear_w8a8_workspace_bytes(s.M, s.N, s.K, 1)
                                              : qnb_linear_w8a16_workspace_bytes(s.M, s.N, s.K, 1);
  Array<char> workspace(bytes);
  return median_seconds([&] {
    if (op == "gemm_w8a8") {
      return qnb_gemm_w8a8(a.codes.get(), a.row_scale.get(), a.packed.get(), a.weight_scale.get(), nullptr, nullptr,
                           QNB_F32, s.M, s.N, s.K, a.out.get(), QNB_F32, workspace.get(), bytes, nullptr);
    }
    const auto linear = op == "linear_w8a8" ? qnb_linear_w8a8 : qnb_linear_w8a16;
    return linear(a.x.get(), QNB_F32, nullptr, a.packed.get(), a.weight_scale.get(), nullptr, QNB_F32, s.M, s.N, s.K,
                  a.out.get(), QNB_F32, workspace.get(), bytes, nullptr);
  });
}

}  // namespace

int main(int count, char** words) {
  if (const char* error = qnb_isa_error()) {
    std::fprintf(stderr, "qnb_bench: %s\n", error);
    return 1;
  }
  const auto wanted = [&](const char* name) {
    for (int i = 1; i < count; ++i) {
      if (std::strstr(name, words[i]) != nullptr) return true;
    }
    return false;
  };
  std::vector<Case> cases;
  for (const Shape& s : {Shape{1, 2048, 2048}, Shape{64, 2048, 2048}, Shape{512, 2048, 2048}}) {
    const auto M = static_cast<double>(s.M), N = static_cast<double>(s.N), K = static_cast<double>(s.K);
    for (const char* op : {"quantize_rows", "quantize_rows_static"}) cases.push_back({op, 0, s, 5 * M * K, "GB/s"});
    for (const char* op : {"gemm_w8a8", "linear_w8a8", "linear_w8a16"}) {
      cases.push_back({op, 0, s, M * N * K, "GMAC/s"});
    }
    for (const int32_t bits : {2, 3, 4, 8}) cases.push_back({"linear_codes", bits, s, M * N * K, "GMAC/s"});
    cases.push_back({"linear_codes_a8", 4, s, M * N * K, "GMAC/s"});
    if (s.M > 1) continue;  // the others know no M
    for (const char* op : {"pack_w8", "unpack_w8"}) cases.push_back({op, 0, s, 2 * N * K, "GB/s"});
    for (const char* op : {"pack_codes", "unpack_codes"}) cases.push_back({op, 4, s, 1.5 * N * K, "GB/s"});
  }
  std::printf("%-20s %4s %-12s %5s %6s %6s %10s %9s\n", "op", "bits", "kernel", "M", "N", "K", "ms", "rate");
  for (const Case& c : cases) {
    Arrays arrays(c.shape);
    for (int32_t i = 0; i < qnb_isa_count(); ++i) {
      const char* isa = qnb_isa_name(i);
      if (qnb_isa_state(i) != 2 || (count > 1 && !wanted(isa) && !wanted(c.op))) continue;
      qnb_limit_isa(isa);
      // Below an instruction set without a kernel of its own for this op and M another answers, in its own turn.
      if (std::strcmp(qnb_kernel_for_rows(c.op, c.shape.M), isa) != 0) continue;
      const double seconds = seconds_of(c.op, c.bits, c.shape, arrays);
      std::printf("%-20s %4s %-12s %5lld %6lld %6lld %10.4f %9.1f %s\n", c.op,
                  c.bits == 0 ? "" : std::to_string(c.bits).c_str(), isa, static_cast<long long>(c.shape.M),
                  static_cast<long long>(c.shape.N), static_cast<long long>(c.shape.K), 1e3 * seconds,
                  1e-9 * c.work / seconds, c.unit);
      std::fflush(stdout);
    }
  }
  return 0;
}
