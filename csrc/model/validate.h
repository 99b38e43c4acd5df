// Checks of a model, its weights and its cache before a step may run. The kernels themselves check
// nothing. A function that returns a string returns "" if everything is valid. Otherwise it returns
// an error message that says what was found and what is needed.
#pragma once
#include <string>

#include "model/model.h"

namespace lamoe {

// Limit of the width and height of a matrix. Within it, width * height fits into int64, and 512
// times either of them fits into int.
constexpr int kMaxWidth = 1 << 22;

std::string wrong_sizes(int fmt, int64_t n, int64_t k);  // checks a matrix [n outputs, k inputs]
std::string wrong(const Config& c);
std::string wrong(const Codec& c);
std::string wrong(const Codec& c, const Config& config);
// Finds a weight that is missing or whose size does not match the config.
std::string wrong(const Model& m, bool head);

// Number of elements of the named vector or unpacked tensor. Returns 0 if a model with this config
// has no tensor of that name.
size_t vector_size(const Config& c, const std::string& name);
size_t raw_size(const Config& c, const std::string& name);

}  // namespace lamoe
