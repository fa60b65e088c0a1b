// An allocator whose buffers end where a page ends that nobody may touch: what a sanitizer cannot see (masked loads and
// stores are no memory accesses to it) is then fatal all the same. Preloaded before a process, by
// test_kernels_sanitizer.py.
//
// Only what torch's tensors (posix_memalign) and the kernels' scratch (aligned_alloc) are made with is fenced. A tensor
// begins wherever its end wants it, so also at addresses that no vector is aligned to. Nothing is used twice, so that a
// buffer that was given back is out of bounds as well.
#include <sys/mman.h>

#include <atomic>
#include <cerrno>
#include <cstddef>

namespace {

constexpr size_t PAGE = 4096, ARENA = size_t{1} << 40;
constexpr size_t TENSOR = 64;  // what torch's allocator aligns tensors to

char* arena() {
  static char* const start = static_cast<char*>(
      mmap(nullptr, ARENA, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  return start;
}

// Bytes of the buffer that begins in a page of the arena.
size_t& room_of(const char* data) {
  static size_t* const rooms = static_cast<size_t*>(mmap(nullptr, ARENA / PAGE * sizeof(size_t), PROT_READ | PROT_WRITE,
                                                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  return rooms[static_cast<size_t>(data - arena()) / PAGE];
}

std::atomic<size_t> used{0};

// `bytes` that end where a page ends, from a multiple of `alignment` on; null where the arena is full.
void* fenced(size_t alignment, size_t bytes) {
  size_t whole = (bytes + alignment - 1) / alignment * alignment, room = (whole + PAGE - 1) / PAGE * PAGE;
  size_t offset = used.fetch_add(room + PAGE);
  if (offset + room + PAGE > ARENA) return nullptr;
  char* pages = arena() + offset;
  if (mprotect(pages, room, PROT_READ | PROT_WRITE) != 0) return nullptr;
  room_of(pages) = room;
  return pages + room - whole;
}

}  // namespace

extern "C" {

void __libc_free(void* data);  // glibc's own

int posix_memalign(void** out, size_t alignment, size_t bytes) {
  *out = fenced(alignment == TENSOR ? 1 : alignment, bytes ? bytes : 1);
  return *out ? 0 : ENOMEM;
}

void* aligned_alloc(size_t alignment, size_t bytes) { return fenced(alignment < PAGE ? alignment : PAGE, bytes); }

void free(void* data) {
  char* at = static_cast<char*>(data);
  if (at < arena() || at >= arena() + ARENA) return __libc_free(data);
  char* pages = arena() + (at - arena()) / static_cast<ptrdiff_t>(PAGE) * static_cast<ptrdiff_t>(PAGE);
  mprotect(pages, room_of(pages), PROT_NONE);
  madvise(pages, room_of(pages), MADV_DONTNEED);
}
}
