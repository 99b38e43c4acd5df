// What a model, its weights and its cache must be before a step may run: the kernels themselves
// check nothing. "" when all is well, else what is wrong, with what was found and what is wanted.
#pragma once
#include <string>

#include "model/model.h"

namespace lamoe {

constexpr int kMaxWidth = 1 << 22;  // of any matrix side: products of two sizes stay inside int64,
                                    // of one and 512 inside int

std::string wrong_sizes(int fmt, int64_t n, int64_t k);  // of a matrix
std::string wrong(const Config& c);
std::string wrong(const Codec& c);
std::string wrong(const Codec& c, const Config& config);
std::string wrong(const Model& m,
                  bool head);  // a weight that is not there, or of another size than the config's

size_t row_bytes(const Codec& c);  // of a row that is made of parts, bits and groups like these

// Elements of a vector or of raw elements by name; 0 for a name that the config does not have.
size_t vector_size(const Config& c, const std::string& name);
size_t raw_size(const Config& c, const std::string& name);

}  // namespace lamoe
