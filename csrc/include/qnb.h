/* qnb's C ABI: quantized linear algebra over raw pointers.
 *
 * No function here allocates, starts a thread or knows of torch. The caller hands in the memory (each function that
 * needs scratch has a ..._workspace_bytes beside it) and, if it wants more than one thread, a parallel-for.
 *
 * Words: M rows of activations, N outputs, K the reduced axis. Matrices are row-major and contiguous. s8 and s32 are
 * signed integers of that many bits; f32, bf16, f16 are float types.
 *
 * Float rules, so that every kernel gives the same bits:
 *   - bf16 and f16 inputs are widened to f32 first, which is exact; all arithmetic is f32, round-half-to-even;
 *   - a division is a division (never a multiplication by a rounded reciprocal), a product and a sum are two roundings
 *     (never fused), except in the sums of qnb_linear_w8a16 and qnb_linear_codes, which say so;
 *   - a result is rounded half to even to its type; a NaN becomes 0x7FC0 in bf16 and 0x7E00 in f16;
 *   - the floating-point environment is the default one.
 *
 * Functions return 0, or a negative qnb_error; qnb_error_text gives it in words. After an error nothing was written.
 * All of them are pure and may be called from any number of threads at once, with memory of their own.
 */
#ifndef QNB_H
#define QNB_H

#include <stdint.h>

#if defined(_WIN32)
#define QNB_API __declspec(dllexport)
#else
#define QNB_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* Float types of activations, results and biases. */
typedef enum { QNB_F32 = 0, QNB_BF16 = 1, QNB_F16 = 2 } qnb_dtype;

typedef enum {
  QNB_OK = 0,
  QNB_ERROR_SIZE = -1,      /* a negative size, or sizes whose product leaves int64 */
  QNB_ERROR_K = -2,         /* K above QNB_MAX_K, or QNB_MAX_K_SHIFTED: a sum of s8 products could leave s32 */
  QNB_ERROR_DTYPE = -3,     /* no qnb_dtype */
  QNB_ERROR_NULL = -4,      /* a null pointer to memory that is not empty */
  QNB_ERROR_WORKSPACE = -5, /* workspace smaller than ..._workspace_bytes said */
  QNB_ERROR_ISA = -6,       /* QNB_ISA names no instruction set; see qnb_isa_error */
  QNB_ERROR_BITS = -7,      /* codes of a number of bits other than 2, 3, 4, 8 */
  QNB_ERROR_GROUP = -8,     /* a group that is neither a multiple of 32 (or 64: see the function) nor at least K */
  QNB_ERROR_CODE = -9,      /* a code that does not fit its bits */
  QNB_ERROR_GRID = -10      /* a static scale that is not positive and finite, or a zero point that is no s8 */
} qnb_error;

/* |sum of K products of two s8| <= K * 2^14, which s32 holds up to here. */
#define QNB_MAX_K 131071

/* Activation codes less their zero point reach from -255 to 255: |sum| <= K * 255 * 2^7 then. */
#define QNB_MAX_K_SHIFTED 65535

/* One sentence for an error code; never null. */
QNB_API const char* qnb_error_text(int32_t code);

/* ---- Threads ---------------------------------------------------------------------------------------------------- */

/* The caller's threads. `run` calls task(argument, t) exactly once for each 0 <= t < tasks, in any order and on any
 * thread, and returns when all have returned. qnb asks for at most `threads` tasks. A null qnb_parallel means one
 * thread: the caller's. No result depends on it. */
typedef struct {
  void (*run)(void* context, int64_t tasks, void (*task)(void* argument, int64_t t), void* argument);
  void* context;
  int32_t threads;
} qnb_parallel;

/* ---- Instruction sets ------------------------------------------------------------------------------------------- */

/* The instruction sets that qnb knows, best first: index 0 <= i < qnb_isa_count(). */
QNB_API int32_t qnb_isa_count(void);
QNB_API const char* qnb_isa_name(int32_t i);

/* 0: this build has no kernel for it; 1: this processor (or operating system) cannot run it; 2: usable. */
QNB_API int32_t qnb_isa_state(int32_t i);

/* Sets a ceiling for the whole process: from now on only kernels of the named instruction set or of one after it in
 * the list are used. Null takes the ceiling away. Returns QNB_ERROR_ISA for an unknown name, and changes nothing then.
 * At the start the ceiling is what the environment variable QNB_ISA says, if it is set. */
QNB_API int32_t qnb_limit_isa(const char* name);

/* Null, or what is wrong with the environment variable QNB_ISA, in one line. While it is wrong, every function that
 * needs a kernel returns QNB_ERROR_ISA. */
QNB_API const char* qnb_isa_error(void);

/* The name of the instruction set whose kernel answers for `op` on M rows; null for an unknown op. A kernel that is
 * best for many rows may leave few to another: qnb_kernel_for names the one for many.
 * Ops: "quantize_rows", "quantize_rows_static", "gemm_w8a8", "pack_w8", "unpack_w8", "pack_codes", "unpack_codes", and
 * for their products "linear_w8a8", "linear_w8a8_static", "linear_w8a16", "linear_codes", "linear_codes_a8". */
QNB_API const char* qnb_kernel_for_rows(const char* op, int64_t M);
QNB_API const char* qnb_kernel_for(const char* op);

/* ---- Rows to s8 ------------------------------------------------------------------------------------------------- */

/* A divisor, f32 (K), may be null. If it is not, f32(x[m,k]) / divisor[k], rounded to f32, takes the place of x[m,k] in
 * this function and in every product below. */

/* For each row m of x (M, K):
 *   absmax   = max over k of |x[m,k]|
 *   scale[m] = absmax / 127
 *   code[m,k] = clamp(round_half_even(x[m,k] / scale[m]), -127, 127)
 * If scale[m] is 0 (absmax is 0, or so small that the division underflows; K = 0 too), the row's codes are 0.
 * If a row holds a NaN or an infinity, its scale is NaN and its codes are 0: what is computed from it is NaN, and no
 * other row is touched. */
QNB_API int32_t qnb_quantize_rows(const void* x, int32_t x_dtype, const float* divisor, int64_t M, int64_t K,
                                  int8_t* codes, float* scales, const qnb_parallel* parallel);

/* The same with one scale and zero point for all rows:
 *   code[m,k] = clamp(round_half_even(x[m,k] / scale) + zero, -128, 127),   scales[m] = scale
 * scale is positive and finite, -128 <= zero <= 127. A row with a NaN or an infinity: scales[m] NaN, codes 0. */
QNB_API int32_t qnb_quantize_rows_static(const void* x, int32_t x_dtype, const float* divisor, float scale,
                                         int32_t zero, int64_t M, int64_t K, int8_t* codes, float* scales,
                                         const qnb_parallel* parallel);

/* ---- Packed weights --------------------------------------------------------------------------------------------- */

/* QNB_LAYOUT_S8_N32K64, the one layout of 8-bit weights for all instruction sets. N is padded with zeros to a multiple
 * of 32, K to a multiple of 64, and w (N, K) is stored as
 *
 *   packed[n / 32][k / 64][n / 16 % 2][k / 4 % 16][n % 16][k % 4] = w[n, k]
 *
 * Each 64-byte line is 16 outputs x 4 k: one operand of vpdpbusd. Each 1 KiB is 16 such lines: one B tile of AMX.
 * A panel of 32 outputs is contiguous over all of K, so that a product reads the weight front to back. Packing is a
 * bijection on w: unpack(pack(w)) = w for every s8 value. Nothing requires alignment; 64 bytes is fastest. */
QNB_API int64_t qnb_packed_w8_bytes(int64_t N, int64_t K);
QNB_API int32_t qnb_pack_w8(const int8_t* w, int64_t N, int64_t K, int8_t* packed, const qnb_parallel* parallel);
QNB_API int32_t qnb_unpack_w8(const int8_t* packed, int64_t N, int64_t K, int8_t* w, const qnb_parallel* parallel);

/* QNB_LAYOUT_CODES_N32K64: codes of 2, 3, 4 or 8 bits, N and K padded as above with code 0. A block of 32 outputs x 64 k
 * is 256 * bits bytes. With p the place of a code among the 2048 of its block in the order above,
 *   p = 1024 * (n / 16 % 2) + 64 * (k / 4 % 16) + 4 * (n % 16) + k % 4,   and i the place of a byte in the block:
 *
 *   8 bits   byte i is code i
 *   4 bits   byte i is codes i and i + 1024, the first in the low bits
 *   2 bits   byte i is codes i, i + 512, i + 1024, i + 1536, the first in the lowest bits
 *   3 bits   with K16 = k / 16 % 4 and r = 4 * (n % 16) + k % 4, the word of 24 bits that is the sum over h < 2, l < 4 of
 *            code[1024 h + 256 K16 + 64 l + r] << 3 * (4 h + l); its byte b is byte 192 K16 + 64 b + r
 *
 * Sixteen neighbouring bytes (at 3 bits, of three lines) so hold sixteen neighbouring codes of several places, each one
 * shift away. Blocks follow each other as above: [n / 32][k / 64]. Packing is a bijection on codes below 2^bits; a code that is not is refused. */
QNB_API int64_t qnb_packed_codes_bytes(int64_t N, int64_t K, int32_t bits);
QNB_API int32_t qnb_pack_codes(const uint8_t* codes, int64_t N, int64_t K, int32_t bits, uint8_t* packed,
                               const qnb_parallel* parallel);
QNB_API int32_t qnb_unpack_codes(const uint8_t* packed, int64_t N, int64_t K, int32_t bits, uint8_t* codes,
                                 const qnb_parallel* parallel);

/* ---- Products --------------------------------------------------------------------------------------------------- */

/* out[m,n] = cast(((f32(acc) * row_scale[m]) * weight_scale[n]) + bias[n]),   acc = sum over k of code[m,k] * w[n,k]
 * acc is exact in s32 for every s8 code and weight, -128 included; it is rounded once, to f32. Without a bias (null)
 * nothing is added. K = 0 gives acc = 0. Same bits for every kernel, M, and number of threads.
 * With a shift, s32 (N), f32(acc + shift[n]) takes the place of f32(acc): shift[n] = -zero * sum over k of w[n,k] makes
 * it the product with codes that have a zero point. K is then at most QNB_MAX_K_SHIFTED, and it is the caller's part
 * that acc + shift fits s32, which that shift does; a sum that does not is taken modulo 2^32. */
QNB_API int64_t qnb_gemm_w8a8_workspace_bytes(int64_t M, int64_t N, int64_t K, int32_t threads);
QNB_API int32_t qnb_gemm_w8a8(const int8_t* codes, const float* row_scale, const int8_t* packed,
                              const float* weight_scale, const int32_t* shift, const void* bias, int32_t bias_dtype,
                              int64_t M, int64_t N, int64_t K, void* out, int32_t out_dtype, void* workspace,
                              int64_t workspace_bytes, const qnb_parallel* parallel);

/* qnb_quantize_rows, then qnb_gemm_w8a8: the same bits, without storing the codes outside the workspace. */
QNB_API int64_t qnb_linear_w8a8_workspace_bytes(int64_t M, int64_t N, int64_t K, int32_t threads);
QNB_API int32_t qnb_linear_w8a8(const void* x, int32_t x_dtype, const float* divisor, const int8_t* packed,
                                const float* weight_scale, const void* bias, int32_t bias_dtype, int64_t M, int64_t N,
                                int64_t K, void* out, int32_t out_dtype, void* workspace, int64_t workspace_bytes,
                                const qnb_parallel* parallel);

/* qnb_quantize_rows_static, then qnb_gemm_w8a8 with that shift. */
QNB_API int64_t qnb_linear_w8a8_static_workspace_bytes(int64_t M, int64_t N, int64_t K, int32_t threads);
QNB_API int32_t qnb_linear_w8a8_static(const void* x, int32_t x_dtype, const float* divisor, float scale, int32_t zero,
                                       const int8_t* packed, const float* weight_scale, const int32_t* shift,
                                       const void* bias, int32_t bias_dtype, int64_t M, int64_t N, int64_t K, void* out,
                                       int32_t out_dtype, void* workspace, int64_t workspace_bytes,
                                       const qnb_parallel* parallel);

/* out[m,n] = cast((acc * weight_scale[n]) + bias[n]),   acc = sum over k of f32(x[m,k]) * f32(w[n,k]) in f32
 * The order of the sum, and whether a product is fused into it, is the kernel's; for one kernel it depends neither on
 * M nor on the number of threads, so a row's bits do not either. However it is ordered,
 *   |acc - exact| <= gamma(K + 2) * sum over k of |x[m,k]| |w[n,k]|,   gamma(n) = n u / (1 - n u), u = 2^-24,
 * unless something overflows or underflows. (A sum of K products in any order has at most K roundings on the way of
 * each product, and the partial sums of a kernel add at most two.) */
QNB_API int64_t qnb_linear_w8a16_workspace_bytes(int64_t M, int64_t N, int64_t K, int32_t threads);
QNB_API int32_t qnb_linear_w8a16(const void* x, int32_t x_dtype, const float* divisor, const int8_t* packed,
                                 const float* weight_scale, const void* bias, int32_t bias_dtype, int64_t M, int64_t N,
                                 int64_t K, void* out, int32_t out_dtype, void* workspace, int64_t workspace_bytes,
                                 const qnb_parallel* parallel);

/* out[m,n] = cast(acc + bias[n]),   acc = sum over k of f32(x[m,k]) * w[n,k] in f32,   g = k / group,
 *   w[n,k] = (value - zero[n,g]) * scale[n,g], each step rounded to f32,
 *   value  = table[code[n,k]], or code[n,k] - 2^(bits - 1) where table is null
 * packed holds the codes, of 2, 3, 4 or 8 bits; table is f32 (2^bits); scale and zero are f32 (N, ceil(K / group)), zero
 * null where nothing is taken away. group is a multiple of 32, or at least K: one scale an output. Values, zeros and
 * scales are finite; of one that is not, NaN may also come where it meets no activation but padding.
 * acc is bounded and depends on nothing, as in qnb_linear_w8a16, with w in the place of f32(w). */
QNB_API int64_t qnb_linear_codes_workspace_bytes(int64_t M, int64_t N, int64_t K, int32_t threads);
QNB_API int32_t qnb_linear_codes(const void* x, int32_t x_dtype, const float* divisor, const uint8_t* packed,
                                 int32_t bits, int64_t group, const float* scale, const float* zero,
                                 const float* table, const void* bias, int32_t bias_dtype, int64_t M, int64_t N,
                                 int64_t K, void* out, int32_t out_dtype, void* workspace, int64_t workspace_bytes,
                                 const qnb_parallel* parallel);

/* Rows of x to codes c and scales as in qnb_quantize_rows, then integers inside a group:
 *   acc[g]   = sum over the k of group g of c[m,k] * (code[n,k] - 2^(bits - 1)), exact in s32
 *   total    = f32(acc[0]) * scale[n,0], then + f32(acc[g]) * scale[n,g] in the order of g, never fused
 *   out[m,n] = cast((total * row_scale[m]) + bias[n])
 * group is a multiple of 64, or at least K; the shorter of both is at most QNB_MAX_K. K = 0 gives total = 0. Same bits
 * for every kernel, M, and number of threads. */
QNB_API int64_t qnb_linear_codes_a8_workspace_bytes(int64_t M, int64_t N, int64_t K, int32_t threads);
QNB_API int32_t qnb_linear_codes_a8(const void* x, int32_t x_dtype, const float* divisor, const uint8_t* packed,
                                    int32_t bits, int64_t group, const float* scale, const void* bias,
                                    int32_t bias_dtype, int64_t M, int64_t N, int64_t K, void* out, int32_t out_dtype,
                                    void* workspace, int64_t workspace_bytes, const qnb_parallel* parallel);

#ifdef __cplusplus
}
#endif

#endif
