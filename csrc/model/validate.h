// Checks of a model, its weights and its cache before a step may run. The kernels themselves check
// nothing. Functions that return a string return "" if all is well, else a message with what was
// found and what is needed.
#pragma once
#include <string>

#include "model/model.h"

namespace lamoe {

// Limit of each side of a matrix. The product of two sides then fits into int64, and 512 times one
// side fits into int.
constexpr int kMaxWidth = 1 << 22;

std::string wrong_sizes(int fmt, int64_t n, int64_t k);  // checks a matrix
std::string wrong(const Config& c);
std::string wrong(const Codec& c);
std::string wrong(const Codec& c, const Config& config);
// Names a weight that is missing or does not have the size that the config demands.
std::string wrong(const Model& m, bool head);

// Number of elements of a vector, or of a tensor of raw elements, by name. Returns 0 if the config
// has no tensor of this name.
size_t vector_size(const Config& c, const std::string& name);
size_t raw_size(const Config& c, const std::string& name);

}  // namespace lamoe
