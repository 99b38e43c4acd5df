// Reports a failed read of a memory-mapped file, which the system signals by SIGBUS.
#pragma once

#include <cstddef>
#include <string>

namespace lamoe {

// Exit code of a process that could not read a mapped file: EX_IOERR of sysexits.h.
constexpr int kMappedFileExit = 74;

// Watch [begin, begin + bytes). If a read inside it fails, write `message` to standard error and
// end the process with kMappedFileExit. Return an id for unwatch_mapping. The first call installs a
// handler of SIGBUS. All other causes of SIGBUS go to the handler that was there before.
int watch_mapping(const void* begin, size_t bytes, const std::string& message);

// Stop watching, before the memory is unmapped.
void unwatch_mapping(int id);

}  // namespace lamoe
