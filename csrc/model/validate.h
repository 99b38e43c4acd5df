// What a model, its weights and its cache must be before a step may run; the kernels themselves
// check nothing. Functions that return a string return "" if all is well, else a message with what
// was found and what is needed.
#pragma once
#include <string>

#include "model/model.h"

namespace lamoe {

// Limit of each side of a matrix: products of two sizes stay inside int64, and of one size and 512
// inside int.
constexpr int kMaxWidth = 1 << 22;

std::string wrong_sizes(int fmt, int64_t n, int64_t k);  // of a matrix
std::string wrong(const Config& c);
std::string wrong(const Codec& c);
std::string wrong(const Codec& c, const Config& config);
// A weight that is missing, or not of the size that the config says.
std::string wrong(const Model& m, bool head);

// Elements of a vector or of raw elements by name; 0 if the config has no such name.
size_t vector_size(const Config& c, const std::string& name);
size_t raw_size(const Config& c, const std::string& name);

}  // namespace lamoe
