// The caller's scratch memory, cut into arrays. Baseline code only.
#pragma once

#include <cstdint>

namespace qnb {

// Counts what is taken from it; with a null base it only counts. Arrays begin at multiples of 64 bytes, and are an odd
// number of 64-byte lines long, so that arrays of a power of two do not all fall on the same lines of a cache.
class Workspace {
 public:
  explicit Workspace(void* base) : base_(static_cast<char*>(base)) {
    if (base_ != nullptr) used_ = static_cast<int64_t>(-reinterpret_cast<uintptr_t>(base_) & 63);
  }

  template <class T>
  T* take(int64_t count) {
    const int64_t bytes = ((count * static_cast<int64_t>(sizeof(T)) + 63) / 64 | 1) * 64;
    T* place = base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + used_);
    used_ += bytes;
    return place;
  }

  // How far into the caller's memory the arrays reach.
  int64_t used() const { return used_; }

  // With a null base: what the caller must hand in, so that there is room to align the beginning.
  int64_t bytes_to_ask_for() const { return used_ + 63; }

 private:
  char* base_;
  int64_t used_ = 0;
};

}  // namespace qnb
