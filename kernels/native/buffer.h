// Memory that is used again.
#pragma once

#include <cstdint>
#include <memory>
#include <new>

namespace specserve {

// Elements that keep their largest number; what they held is lost with every call. They begin with a cache line: a row of a
// matrix tile is one, and takes twice as long to load where it lies in two.
template <class Element>
class BufferOf {
 public:
  Element* get(std::int64_t size) {
    if (size > size_) {
      data_.reset(static_cast<Element*>(::operator new(static_cast<std::size_t>(size) * sizeof(Element), kLine)));
      size_ = size;
    }
    return data_.get();
  }

 private:
  static constexpr std::align_val_t kLine{64};

  struct Release {
    void operator()(Element* data) const { ::operator delete(data, kLine); }
  };

  std::unique_ptr<Element, Release> data_;
  std::int64_t size_ = 0;
};

using Buffer = BufferOf<float>;

}  // namespace specserve
