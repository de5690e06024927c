#include <algorithm>
#include <limits>
#include <vector>

#include "common/scalar.h"
#include "common/simd.h"
#include "ops/topk_update/topk_update.h"

namespace bbfast {
namespace {

constexpr int64_t kBlock = 32;  // columns of a task

template <class C>
struct Entry {
  C value;
  uint64_t id;  // a free place, -1, is the largest
};

template <class C>
bool better(const Entry<C>& a, const Entry<C>& b) {
  return a.value > b.value || (a.value == b.value && a.id < b.id);
}

// How many of a row's values could enter: those not below the worst that is kept, and NaN.
template <class T, class C>
BBFAST_CLONES int32_t candidates(const T* __restrict x, const C* __restrict worst, int64_t count) {
  int32_t found = 0;
  for (int64_t j = 0; j < count; ++j) found += load(x[j]) < worst[j] ? 0 : 1;
  return found;
}

// The kept values of one task's columns, each column a heap with the worst in front.
template <class T>
class Columns {
 public:
  using C = Compute<T>;

  Columns(const OldTopK<T>& old, const TopKShape& shape, int64_t from, int64_t count)
      : kept_(shape.kept), from_(from), count_(count), heaps_(count * shape.kept), worst_(count), nans_(count, 0) {
    for (int64_t j = 0; j < count; ++j) {
      for (int64_t i = 0; i < kept_; ++i) {
        const int64_t at = (from + j) * kept_ + i;
        // Best first becomes worst first, which is a heap as it stands.
        heap(j)[kept_ - 1 - i] = old.values != nullptr
                                     ? Entry<C>{load(old.values[at]), static_cast<uint64_t>(old.ids[at])}
                                     : Entry<C>{-std::numeric_limits<C>::infinity(), ~uint64_t{0}};
      }
      // A state that was not made by this operation may have any order.
      if (!std::is_heap(heap(j), heap(j) + kept_, better<C>)) std::make_heap(heap(j), heap(j) + kept_, better<C>);
      worst_[j] = heap(j)->value;
      if (old.nans != nullptr) nans_[j] = old.nans[from + j];
    }
  }

  void add(const T* row, uint64_t id) {
    if (candidates(row + from_, worst_.data(), count_) == 0) return;
    for (int64_t j = 0; j < count_; ++j) {
      C value = load(row[from_ + j]);
      if (value != value) {
        ++nans_[j];
        value = -std::numeric_limits<C>::infinity();
      }
      const Entry<C> entry{value, id};
      if (!better(entry, *heap(j))) continue;
      std::pop_heap(heap(j), heap(j) + kept_, better<C>);
      heap(j)[kept_ - 1] = entry;
      std::push_heap(heap(j), heap(j) + kept_, better<C>);
      worst_[j] = heap(j)->value;
    }
  }

  void write(const NewTopK<T>& out) {
    for (int64_t j = 0; j < count_; ++j) {
      std::sort_heap(heap(j), heap(j) + kept_, better<C>);
      for (int64_t i = 0; i < kept_; ++i) {
        out.values[(from_ + j) * kept_ + i] = store<T>(heap(j)[i].value);
        out.ids[(from_ + j) * kept_ + i] = static_cast<int64_t>(heap(j)[i].id);
      }
      out.nans[from_ + j] = nans_[j];
    }
  }

 private:
  Entry<C>* heap(int64_t j) { return heaps_.data() + j * kept_; }

  int64_t kept_, from_, count_;
  std::vector<Entry<C>> heaps_;
  std::vector<C> worst_;
  std::vector<int64_t> nans_;
};

}  // namespace

template <class T>
void topk_update_cpu(const T* activations, const int64_t* ids, OldTopK<T> old, NewTopK<T> out, TopKShape shape,
                     ParallelFor parallel) {
  auto body = [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t from = block * kBlock;
      Columns<T> columns(old, shape, from, std::min(kBlock, shape.columns - from));
      for (int64_t r = 0; r < shape.rows; ++r) {
        columns.add(activations + r * shape.columns, static_cast<uint64_t>(ids[r]));
      }
      columns.write(out);
    }
  };
  const int64_t bytes = kBlock * (shape.rows * static_cast<int64_t>(sizeof(T)) + shape.kept * 32);
  for_range(parallel, (shape.columns + kBlock - 1) / kBlock, grain_for(bytes), body);
}

#define BBFAST_TOPK(T) \
  template void topk_update_cpu(const T*, const int64_t*, OldTopK<T>, NewTopK<T>, TopKShape, ParallelFor)
BBFAST_TOPK(float);
BBFAST_TOPK(double);
BBFAST_TOPK(Half);
BBFAST_TOPK(BFloat16);

}  // namespace bbfast
