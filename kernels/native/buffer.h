// Memory that is used again.
#pragma once

#include <cstdint>
#include <memory>

namespace specserve {

// Floats that keep their largest size; what they held is lost with every call.
class Buffer {
 public:
  float* get(std::int64_t size) {
    if (size > size_) {
      data_.reset(new float[static_cast<std::size_t>(size)]);
      size_ = size;
    }
    return data_.get();
  }

 private:
  std::unique_ptr<float[]> data_;
  std::int64_t size_ = 0;
};

}  // namespace specserve
