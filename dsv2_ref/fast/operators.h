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

template <typename Element>
static const Element* data(const Tensor& tensor) {
    return static_cast<const Element*>(tensor.const_data_ptr());
}

template <typename Element>
static Element* data(Tensor& tensor) {
    return static_cast<Element*>(tensor.mutable_data_ptr());
}
