// What the operators of torch that are written in C++ share. It stands before each of their files.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <vector>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

using bfloat16 = uint16_t;  // its bits are the upper half of a float's
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename... Parts>
static void require(bool fits, const Parts&... parts) {
    if (fits) return;
    std::ostringstream line;
    (line << ... << parts);
    throw std::runtime_error(line.str());
}

static void require_memory(const Tensor& tensor, const void* start) {
    require(start || tensor.numel() == 0, "a tensor's memory was given away");
}

template <typename Element>
static const Element* data(const Tensor& tensor) {
    const void* start = tensor.const_data_ptr();
    require_memory(tensor, start);
    return static_cast<const Element*>(start);
}

template <typename Element>
static Element* data(Tensor& tensor) {
    void* start = tensor.mutable_data_ptr();
    require_memory(tensor, start);
    return static_cast<Element*>(start);
}

static inline float value(bfloat16 bits) {
    uint32_t wide = uint32_t(bits) << 16;
    float number;
    std::memcpy(&number, &wide, sizeof number);
    return number;
}

static bfloat16 nearest(float number) {  // in bfloat16, ties to even
    uint32_t bits;
    std::memcpy(&bits, &number, sizeof bits);
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

// What stands in a cache: codes of one of CACHE_FORMATS, or numbers in bfloat16 without scales.
enum Format : int64_t { FP8, INT8, INT4, BFLOAT16 };

static constexpr int64_t size_of(Format format, int64_t codes) {  // in bytes
    return format == INT4 ? codes / 2 : format == BFLOAT16 ? codes * 2 : codes;
}

// Numbers that the processor computes with at once

#ifdef __AVX512F__
const int LANES = 16, SUMS = 16;  // numbers in a register of the processor; sums that keep it busy and fit into its registers
#elif defined(__AVX__)
const int LANES = 8, SUMS = 8;
#else
const int LANES = 4, SUMS = 8;
#endif

typedef float floats __attribute__((vector_size(4 * LANES)));
typedef int32_t integers __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));
typedef uint8_t bytes __attribute__((vector_size(LANES)));
typedef uint32_t word __attribute__((may_alias));  // of any of them

template <typename Vector>
static inline Vector load(const void* from) {
    Vector vector;
    std::memcpy(&vector, from, sizeof vector);
    return vector;
}

static inline floats all(float number) { return number - floats{}; }
static inline floats numbers(integers x) { return __builtin_convertvector(x, floats); }
static inline floats larger(floats a, floats b) { return a > b ? a : b; }

static inline floats exponential(floats x) {  // of at most 0, to the precision of a float
    const floats times = larger(x, all(-87)) * 1.44269504f;
    const integers whole = __builtin_convertvector(times - 0.5f, integers);
    const floats r = (times - numbers(whole)) * 0.693147181f;
    const floats power = 1 + r * (1 + r * (1 / 2.f + r * (1 / 6.f + r * (1 / 24.f + r * (1 / 120.f + r * (1 / 720.f))))));
    return x < -87.f ? all(0) : x != x ? x : power * (floats)((whole + 127) << 23);
}
