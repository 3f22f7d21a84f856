// torch.ops.qnb.* on the CPU: check, allocate, call the C ABI. The schemas are defined in Python (qnb/ops/schema.py);
// include/qnb.h says what each function computes. Only LibTorch's stable ABI is used, so that one build serves every
// torch from 2.10 on.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <new>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "qnb.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// ---- Checks ---------------------------------------------------------------------------------------------------------

std::string word(const char* text) { return text; }
std::string word(int64_t number) { return std::to_string(number); }

// Raises RuntimeError with these words in Python. Not STD_TORCH_CHECK: it writes its message through a string stream,
// which crashes where this library carries a C++ library of its own beside torch's, and puts source lines into it.
template <class... Words>
[[noreturn]] void fail(const Words&... words) {
  throw std::runtime_error((word("qnb: ") + ... + word(words)));
}
// A macro, so that the words are put together only where the condition fails.
#define QNB_REQUIRE(condition, ...) ((condition) ? void() : fail(__VA_ARGS__))

// torch's numbers of the types that cross this boundary, asked for once: the getters are calls into torch.
struct Types {
  int32_t f32 = aoti_torch_dtype_float32();
  int32_t bf16 = aoti_torch_dtype_bfloat16();
  int32_t f16 = aoti_torch_dtype_float16();
  int32_t s8 = aoti_torch_dtype_int8();
  int32_t u8 = aoti_torch_dtype_uint8();
  int32_t s32 = aoti_torch_dtype_int32();
};

const Types& types() {
  static const Types t;
  return t;
}

int32_t type_of(const Tensor& t) {
  int32_t type;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &type));
  return type;
}

int32_t float_code(const Tensor& t, const char* name) {
  const int32_t type = type_of(t);
  if (type == types().f32) return QNB_F32;
  if (type == types().bf16) return QNB_BF16;
  QNB_REQUIRE(type == types().f16, name, " has dtype ", torch::headeronly::toString(t.scalar_type()),
              "; allowed are float32, bfloat16 and float16");
  return QNB_F16;
}

int32_t float_code(ScalarType type) {
  QNB_REQUIRE(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half,
              "the result's dtype is ", torch::headeronly::toString(type),
              "; allowed are float32, bfloat16 and float16");
  return type == ScalarType::Float ? QNB_F32 : type == ScalarType::BFloat16 ? QNB_BF16 : QNB_F16;
}

int32_t type_for(int32_t code) { return code == QNB_F32 ? types().f32 : code == QNB_BF16 ? types().bf16 : types().f16; }

// A contiguous tensor on the CPU with the same elements.
Tensor on_cpu(const Tensor& t, const char* name) {
  QNB_REQUIRE(t.is_cpu(), name, " does not lie on the CPU, as the other arguments do; move it with .to()");
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

Tensor of_type(const Tensor& t, int32_t type, const char* type_name, const char* name) {
  QNB_REQUIRE(type_of(t) == type, name, " has dtype ", torch::headeronly::toString(t.scalar_type()), "; allowed is ",
              type_name);
  return on_cpu(t, name);
}

// (..., K) as M rows of K.
struct Rows {
  int64_t M = 1, K = 0;
  std::vector<int64_t> lead;

  Rows(const Tensor& t, const char* name) {
    const auto sizes = t.sizes();
    QNB_REQUIRE(!sizes.empty(), name, " has no dimension; it needs at least one, of K elements");
    lead.assign(sizes.begin(), sizes.end() - 1);
    for (const int64_t size : lead) M *= size;
    K = sizes.back();
  }

  std::vector<int64_t> with(int64_t last) const {
    std::vector<int64_t> sizes = lead;
    sizes.push_back(last);
    return sizes;
  }
};

void succeed(int64_t code) {
  if (code >= 0) return;
  const char* text = qnb_isa_error();
  fail(text != nullptr ? text : qnb_error_text(static_cast<int32_t>(code)));
}

void check_k(int64_t K, int64_t limit = QNB_MAX_K) {
  QNB_REQUIRE(K <= limit, "K=", K, " is above ", limit,
              ", where a sum of 8-bit products can leave 32 bits; split the layer along its inputs");
}

// An argument that may be left out: null then.
template <class T>
struct Optional {
  std::optional<Tensor> tensor;
  const T* data = nullptr;

  Optional(const std::optional<Tensor>& given, int32_t type, const char* type_name, const char* name, int64_t count) {
    if (!given.has_value()) return;
    tensor = of_type(*given, type, type_name, name);
    QNB_REQUIRE(tensor->numel() == count, name, " holds ", tensor->numel(), " elements; needed are ", count);
    data = static_cast<const T*>(tensor->const_data_ptr());
  }
};

Optional<float> divisor_of(const std::optional<Tensor>& divisor, int64_t K) {
  return {divisor, types().f32, "float32", "divisor", K};
}

struct Bias {
  std::optional<Tensor> tensor;
  const void* data = nullptr;
  int32_t code = QNB_F32;

  Bias(const std::optional<Tensor>& bias, int64_t N) {
    if (!bias.has_value()) return;
    tensor = on_cpu(*bias, "bias");
    code = float_code(*tensor, "bias");
    QNB_REQUIRE(tensor->numel() == N, "bias holds ", tensor->numel(), " elements, but N=", N);
    // An empty bias is a null pointer to torch, which to the C ABI would mean no bias: with N = 0 both are the same.
    data = tensor->const_data_ptr();
  }
};

// The weight's side of a product, checked against N and K.
struct Weight {
  Tensor packed, scale;
  Bias bias;

  Weight(const Tensor& packed_, const Tensor& scale_, const std::optional<Tensor>& bias_, int64_t N, int64_t K)
      : packed(of_type(packed_, types().s8, "int8", "packed")),
        scale(of_type(scale_, types().f32, "float32", "weight_scale")),
        bias(bias_, N) {
    QNB_REQUIRE(N >= 0, "N=", N, " is negative");
    const int64_t bytes = qnb_packed_w8_bytes(N, K);
    succeed(bytes);
    QNB_REQUIRE(packed.numel() == bytes, "packed holds ", packed.numel(), " bytes, but a weight of N=", N, ", K=", K,
                " packs into ", bytes);
    QNB_REQUIRE(scale.numel() == N, "weight_scale holds ", scale.numel(), " scales, but N=", N);
  }

  const int8_t* codes() const { return static_cast<const int8_t*>(packed.const_data_ptr()); }
  const float* scales() const { return static_cast<const float*>(scale.const_data_ptr()); }
};

int32_t checked_bits(int64_t bits) {
  QNB_REQUIRE(bits == 2 || bits == 3 || bits == 4 || bits == 8, "bits is ", bits, "; codes have 2, 3, 4 or 8");
  return static_cast<int32_t>(bits);
}

Tensor packed_codes(const Tensor& packed_, int64_t N, int64_t K, int32_t bits) {
  Tensor packed = of_type(packed_, types().u8, "uint8", "packed");
  const int64_t bytes = qnb_packed_codes_bytes(N, K, bits);
  succeed(bytes);
  QNB_REQUIRE(packed.numel() == bytes, "packed holds ", packed.numel(), " bytes, but codes of N=", N, ", K=", K,
              " at ", bits, " bits pack into ", bytes);
  return packed;
}

// The same for packed codes, whose scales belong to groups.
struct CodesWeight {
  int32_t bits;
  Tensor packed, scale;
  Bias bias;
  int64_t scales_needed;

  CodesWeight(const Tensor& packed_, int64_t bits_, const Tensor& scale_, const std::optional<Tensor>& bias_, int64_t N,
              int64_t K, int64_t group, int64_t multiple)
      : bits(checked_bits(bits_)),
        packed(packed_codes(packed_, N, K, bits)),
        scale(of_type(scale_, types().f32, "float32", "scale")),
        bias(bias_, N) {
    QNB_REQUIRE(group >= 1 && (group % multiple == 0 || group >= K), "group is ", group, "; give a multiple of ",
                multiple, ", or at least K=", K);
    const int64_t groups = K / group + (K % group != 0);
    scales_needed = N * groups;
    QNB_REQUIRE(scale.dim() == 2 && scale.size(0) == N && scale.size(1) == groups, "scale does not have the shape (", N,
                ", ", groups, ") that N=", N, ", K=", K, " in groups of ", group, " need");
  }

  const uint8_t* codes() const { return static_cast<const uint8_t*>(packed.const_data_ptr()); }
  const float* scales() const { return static_cast<const float*>(scale.const_data_ptr()); }
};

// ---- Memory and threads ---------------------------------------------------------------------------------------------

Tensor empty(const std::vector<int64_t>& sizes, int32_t type) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = stride;
    stride *= sizes[i] > 0 ? sizes[i] : 1;
  }
  AtenTensorHandle handle;
  // The shim directly: torch::stable::empty goes through the dispatcher, which costs more than a small product.
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                                                  type, aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

// Scratch for one call: on the stack while small, which spares a small product the allocator.
class Workspace {
 public:
  explicit Workspace(int64_t bytes) : bytes_(bytes) {
    succeed(bytes);
    if (bytes > static_cast<int64_t>(sizeof small_)) {
      large_ = ::operator new(static_cast<size_t>(bytes), std::align_val_t{64});
    }
  }
  ~Workspace() {
    if (large_ != nullptr) ::operator delete(large_, std::align_val_t{64});
  }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  void* data() { return large_ != nullptr ? large_ : small_; }
  int64_t bytes() const { return bytes_; }

 private:
  int64_t bytes_;
  void* large_ = nullptr;
  alignas(64) char small_[16384];
};

// torch's own threads.
const qnb_parallel& parallel() {
  static thread_local qnb_parallel p = {[](void*, int64_t tasks, void (*task)(void*, int64_t), void* argument) {
                                          torch::stable::parallel_for(0, tasks, 1, [&](int64_t first, int64_t end) {
                                            for (int64_t t = first; t < end; ++t) task(argument, t);
                                          });
                                        },
                                        nullptr, 1};
  p.threads = static_cast<int32_t>(torch::stable::get_num_threads());
  return p;
}

// ---- Ops ------------------------------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor> quantize_rows(const Tensor& x_, const std::optional<Tensor>& divisor_) {
  const int32_t code = float_code(x_, "x");
  const Tensor x = on_cpu(x_, "x");
  const Rows rows(x, "x");
  const auto divisor = divisor_of(divisor_, rows.K);
  Tensor codes = empty(rows.with(rows.K), types().s8);
  Tensor scales = empty(rows.lead, types().f32);
  succeed(qnb_quantize_rows(x.const_data_ptr(), code, divisor.data, rows.M, rows.K,
                            static_cast<int8_t*>(codes.mutable_data_ptr()),
                            static_cast<float*>(scales.mutable_data_ptr()), &parallel()));
  return {codes, scales};
}

// A static grid, checked.
struct Grid {
  float scale;
  int32_t zero;

  Grid(double scale_, int64_t zero_) : scale(static_cast<float>(scale_)), zero(static_cast<int32_t>(zero_)) {
    QNB_REQUIRE(scale > 0 && scale <= 3.4028234663852886e38f, "scale is ", std::to_string(scale_).c_str(),
                "; it must be a positive, finite float32");
    QNB_REQUIRE(zero_ >= -128 && zero_ <= 127, "zero is ", zero_, "; a zero point lies from -128 to 127");
  }
};

std::tuple<Tensor, Tensor> quantize_rows_static(const Tensor& x_, double scale, int64_t zero,
                                                const std::optional<Tensor>& divisor_) {
  const int32_t code = float_code(x_, "x");
  const Tensor x = on_cpu(x_, "x");
  const Rows rows(x, "x");
  const auto divisor = divisor_of(divisor_, rows.K);
  const Grid grid(scale, zero);
  Tensor codes = empty(rows.with(rows.K), types().s8);
  Tensor scales = empty(rows.lead, types().f32);
  succeed(qnb_quantize_rows_static(x.const_data_ptr(), code, divisor.data, grid.scale, grid.zero, rows.M, rows.K,
                                   static_cast<int8_t*>(codes.mutable_data_ptr()),
                                   static_cast<float*>(scales.mutable_data_ptr()), &parallel()));
  return {codes, scales};
}

Tensor pack_w8(const Tensor& w_) {
  const Tensor w = of_type(w_, types().s8, "int8", "w");
  QNB_REQUIRE(w.dim() == 2, "w has ", w.dim(), " dimensions; a weight has two, (N, K)");
  const int64_t N = w.size(0), K = w.size(1), bytes = qnb_packed_w8_bytes(N, K);
  succeed(bytes);
  Tensor packed = empty({bytes}, types().s8);
  succeed(qnb_pack_w8(static_cast<const int8_t*>(w.const_data_ptr()), N, K,
                      static_cast<int8_t*>(packed.mutable_data_ptr()), &parallel()));
  return packed;
}

Tensor unpack_w8(const Tensor& packed_, int64_t N, int64_t K) {
  const Tensor packed = of_type(packed_, types().s8, "int8", "packed");
  const int64_t bytes = qnb_packed_w8_bytes(N, K);
  succeed(bytes);
  QNB_REQUIRE(packed.numel() == bytes, "packed holds ", packed.numel(), " bytes, but a weight of N=", N, ", K=", K,
              " packs into ", bytes);
  Tensor w = empty({N, K}, types().s8);
  succeed(qnb_unpack_w8(static_cast<const int8_t*>(packed.const_data_ptr()), N, K,
                        static_cast<int8_t*>(w.mutable_data_ptr()), &parallel()));
  return w;
}

Tensor pack_codes(const Tensor& codes_, int64_t bits_) {
  const int32_t bits = checked_bits(bits_);
  const Tensor codes = of_type(codes_, types().u8, "uint8", "codes");
  QNB_REQUIRE(codes.dim() == 2, "codes has ", codes.dim(), " dimensions; a weight has two, (N, K)");
  const int64_t N = codes.size(0), K = codes.size(1), bytes = qnb_packed_codes_bytes(N, K, bits);
  succeed(bytes);
  Tensor packed = empty({bytes}, types().u8);
  const int32_t error = qnb_pack_codes(static_cast<const uint8_t*>(codes.const_data_ptr()), N, K, bits,
                                       static_cast<uint8_t*>(packed.mutable_data_ptr()), &parallel());
  QNB_REQUIRE(error != QNB_ERROR_CODE, "a code is ", int64_t{1} << bits, " or more; with ", bits,
              " bits codes lie below that");
  succeed(error);
  return packed;
}

Tensor unpack_codes(const Tensor& packed_, int64_t N, int64_t K, int64_t bits_) {
  const int32_t bits = checked_bits(bits_);
  const Tensor packed = packed_codes(packed_, N, K, bits);
  Tensor codes = empty({N, K}, types().u8);
  succeed(qnb_unpack_codes(static_cast<const uint8_t*>(packed.const_data_ptr()), N, K, bits,
                           static_cast<uint8_t*>(codes.mutable_data_ptr()), &parallel()));
  return codes;
}

Tensor gemm_w8a8(const Tensor& codes_, const Tensor& row_scales_, const Tensor& packed, const Tensor& weight_scale,
                 const std::optional<Tensor>& bias, int64_t N, ScalarType dtype, const std::optional<Tensor>& shift_) {
  const Tensor codes = of_type(codes_, types().s8, "int8", "codes");
  const Tensor row_scales = of_type(row_scales_, types().f32, "float32", "row_scales");
  const Rows rows(codes, "codes");
  check_k(rows.K, shift_.has_value() ? QNB_MAX_K_SHIFTED : QNB_MAX_K);
  QNB_REQUIRE(row_scales.numel() == rows.M, "row_scales holds ", row_scales.numel(), " scales for ", rows.M,
              " rows of codes");
  const Weight w(packed, weight_scale, bias, N, rows.K);
  const Optional<int32_t> shift(shift_, types().s32, "int32", "shift", N);
  const int32_t out_code = float_code(dtype);
  Tensor out = empty(rows.with(N), type_for(out_code));
  const qnb_parallel& threads = parallel();
  Workspace workspace(qnb_gemm_w8a8_workspace_bytes(rows.M, N, rows.K, threads.threads));
  succeed(qnb_gemm_w8a8(static_cast<const int8_t*>(codes.const_data_ptr()),
                        static_cast<const float*>(row_scales.const_data_ptr()), w.codes(), w.scales(), shift.data,
                        w.bias.data, w.bias.code, rows.M, N, rows.K, out.mutable_data_ptr(), out_code,
                        workspace.data(), workspace.bytes(), &threads));
  return out;
}

Tensor linear_w8a8(const Tensor& x_, const Tensor& packed, const Tensor& weight_scale,
                   const std::optional<Tensor>& bias, int64_t N, const std::optional<Tensor>& divisor_) {
  const int32_t code = float_code(x_, "x");
  const Tensor x = on_cpu(x_, "x");
  const Rows rows(x, "x");
  check_k(rows.K);
  const Weight w(packed, weight_scale, bias, N, rows.K);
  const auto divisor = divisor_of(divisor_, rows.K);
  Tensor out = empty(rows.with(N), type_for(code));
  const qnb_parallel& threads = parallel();
  Workspace workspace(qnb_linear_w8a8_workspace_bytes(rows.M, N, rows.K, threads.threads));
  succeed(qnb_linear_w8a8(x.const_data_ptr(), code, divisor.data, w.codes(), w.scales(), w.bias.data, w.bias.code,
                          rows.M, N, rows.K, out.mutable_data_ptr(), code, workspace.data(), workspace.bytes(),
                          &threads));
  return out;
}

Tensor linear_w8a8_static(const Tensor& x_, const Tensor& packed, const Tensor& weight_scale,
                          const std::optional<Tensor>& bias, int64_t N, double scale, int64_t zero,
                          const std::optional<Tensor>& shift_, const std::optional<Tensor>& divisor_) {
  const int32_t code = float_code(x_, "x");
  const Tensor x = on_cpu(x_, "x");
  const Rows rows(x, "x");
  check_k(rows.K, shift_.has_value() ? QNB_MAX_K_SHIFTED : QNB_MAX_K);
  const Weight w(packed, weight_scale, bias, N, rows.K);
  const Grid grid(scale, zero);
  const Optional<int32_t> shift(shift_, types().s32, "int32", "shift", N);
  const auto divisor = divisor_of(divisor_, rows.K);
  Tensor out = empty(rows.with(N), type_for(code));
  const qnb_parallel& threads = parallel();
  Workspace workspace(qnb_linear_w8a8_static_workspace_bytes(rows.M, N, rows.K, threads.threads));
  succeed(qnb_linear_w8a8_static(x.const_data_ptr(), code, divisor.data, grid.scale, grid.zero, w.codes(), w.scales(),
                                 shift.data, w.bias.data, w.bias.code, rows.M, N, rows.K, out.mutable_data_ptr(), code,
                                 workspace.data(), workspace.bytes(), &threads));
  return out;
}

Tensor linear_w8a16(const Tensor& x_, const Tensor& packed, const Tensor& weight_scale,
                    const std::optional<Tensor>& bias, int64_t N, const std::optional<Tensor>& divisor_) {
  const int32_t code = float_code(x_, "x");
  const Tensor x = on_cpu(x_, "x");
  const Rows rows(x, "x");
  const Weight w(packed, weight_scale, bias, N, rows.K);
  const auto divisor = divisor_of(divisor_, rows.K);
  Tensor out = empty(rows.with(N), type_for(code));
  const qnb_parallel& threads = parallel();
  Workspace workspace(qnb_linear_w8a16_workspace_bytes(rows.M, N, rows.K, threads.threads));
  succeed(qnb_linear_w8a16(x.const_data_ptr(), code, divisor.data, w.codes(), w.scales(), w.bias.data, w.bias.code,
                           rows.M, N, rows.K, out.mutable_data_ptr(), code, workspace.data(), workspace.bytes(),
                           &threads));
  return out;
}

Tensor linear_codes(const Tensor& x_, const Tensor& packed, const Tensor& scale, const std::optional<Tensor>& zero_,
                    const std::optional<Tensor>& table_, const std::optional<Tensor>& bias, int64_t N, int64_t bits,
                    int64_t group, const std::optional<Tensor>& divisor_) {
  const int32_t code = float_code(x_, "x");
  const Tensor x = on_cpu(x_, "x");
  const Rows rows(x, "x");
  const CodesWeight w(packed, bits, scale, bias, N, rows.K, group, 32);
  const Optional<float> zero(zero_, types().f32, "float32", "zero", w.scales_needed);
  const Optional<float> table(table_, types().f32, "float32", "table", int64_t{1} << w.bits);
  const auto divisor = divisor_of(divisor_, rows.K);
  Tensor out = empty(rows.with(N), type_for(code));
  const qnb_parallel& threads = parallel();
  Workspace workspace(qnb_linear_codes_workspace_bytes(rows.M, N, rows.K, threads.threads));
  succeed(qnb_linear_codes(x.const_data_ptr(), code, divisor.data, w.codes(), w.bits, group, w.scales(), zero.data,
                           table.data, w.bias.data, w.bias.code, rows.M, N, rows.K, out.mutable_data_ptr(), code,
                           workspace.data(), workspace.bytes(), &threads));
  return out;
}

Tensor linear_codes_a8(const Tensor& x_, const Tensor& packed, const Tensor& scale, const std::optional<Tensor>& bias,
                       int64_t N, int64_t bits, int64_t group, const std::optional<Tensor>& divisor_) {
  const int32_t code = float_code(x_, "x");
  const Tensor x = on_cpu(x_, "x");
  const Rows rows(x, "x");
  check_k(group < rows.K ? group : rows.K);
  const CodesWeight w(packed, bits, scale, bias, N, rows.K, group, 64);
  const auto divisor = divisor_of(divisor_, rows.K);
  Tensor out = empty(rows.with(N), type_for(code));
  const qnb_parallel& threads = parallel();
  Workspace workspace(qnb_linear_codes_a8_workspace_bytes(rows.M, N, rows.K, threads.threads));
  succeed(qnb_linear_codes_a8(x.const_data_ptr(), code, divisor.data, w.codes(), w.bits, group, w.scales(),
                              w.bias.data, w.bias.code, rows.M, N, rows.K, out.mutable_data_ptr(), code,
                              workspace.data(), workspace.bytes(), &threads));
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qnb, CPU, m) {
  m.impl("quantize_rows", TORCH_BOX(&quantize_rows));
  m.impl("quantize_rows_static", TORCH_BOX(&quantize_rows_static));
  m.impl("pack_w8", TORCH_BOX(&pack_w8));
  m.impl("unpack_w8", TORCH_BOX(&unpack_w8));
  m.impl("pack_codes", TORCH_BOX(&pack_codes));
  m.impl("unpack_codes", TORCH_BOX(&unpack_codes));
  m.impl("gemm_w8a8", TORCH_BOX(&gemm_w8a8));
  m.impl("linear_w8a8", TORCH_BOX(&linear_w8a8));
  m.impl("linear_w8a8_static", TORCH_BOX(&linear_w8a8_static));
  m.impl("linear_w8a16", TORCH_BOX(&linear_w8a16));
  m.impl("linear_codes", TORCH_BOX(&linear_codes));
  m.impl("linear_codes_a8", TORCH_BOX(&linear_codes_a8));
}
