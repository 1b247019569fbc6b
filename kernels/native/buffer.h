// Memory that is used again.
#pragma once

#include <cstdint>
#include <memory>

namespace specserve {

// Elements that keep their largest number; what they held is lost with every call.
template <class Element>
class BufferOf {
 public:
  Element* get(std::int64_t size) {
    if (size > size_) {
      data_.reset(new Element[static_cast<std::size_t>(size)]);
      size_ = size;
    }
    return data_.get();
  }

 private:
  std::unique_ptr<Element[]> data_;
  std::int64_t size_ = 0;
};

using Buffer = BufferOf<float>;

}  // namespace specserve
