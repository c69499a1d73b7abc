// What differs between the processors that models run on, as three interfaces: a Device is a processor of
// this machine, a Program a model's code and weights there, an Executor the memory and the runs of one
// session.
#ifndef QGRAPH_SRC_DEVICE_H_
#define QGRAPH_SRC_DEVICE_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <string>
#include <string_view>
#include <vector>

#include "binding.h"
#include "host.h"
#include "plan.h"

namespace qg {

// As std::bad_alloc, of memory that is not the host's own.
class OutOfMemory : public std::bad_alloc {
 public:
  // `where` has no `size` bytes left; `reason` is how the driver puts that.
  OutOfMemory(const std::string& where, size_t size, const char* reason) noexcept;
  const char* what() const noexcept override { return text_; }

 private:
  char text_[160];
};

// "out of memory", and of which device.
const char* out_of_memory_text(const std::bad_alloc& error) noexcept;

// Memory of a device, which only grows.
class Buffer {
 public:
  Buffer() = default;
  virtual ~Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  // Makes room for `size` bytes, a multiple of the executor's alignment; what was in the buffer is lost if it
  // has to grow. Throws std::bad_alloc.
  virtual void reserve(size_t size) = 0;
  // Gives all memory back.
  virtual void release() noexcept = 0;

  uint8_t* data() const { return data_; }
  size_t size() const { return size_; }

 protected:
  uint8_t* data_ = nullptr;
  size_t size_ = 0;
};

// The steps of a run as numbers.
struct StepTable {
  // A number, plus bases[base]: so memory may move between runs.
  struct Argument {
    int64_t number = 0;
    size_t base = 0;
  };

  std::vector<int64_t> blocks;    // by step; 0: it is not run, and its arguments may be out of date
  std::vector<Argument> args;     // of all steps, one after another
  std::vector<size_t> first_arg;  // by step, into args
  std::vector<int64_t> bases;     // address by value; then a 0, for arguments that point nowhere

  int64_t argument(size_t step, size_t index) const {
    const Argument& arg = args[first_arg[step] + index];
    return arg.number + bases[arg.base];
  }
};

// `count` times `width` bytes, each so many bytes behind the one before. Nothing overlaps.
struct RowCopy {
  uint8_t* to;
  int64_t to_pitch;
  const uint8_t* from;
  int64_t from_pitch;
  int64_t width, count;
};

// Memory of the caller that a run reads or writes, and its slot of the arena.
struct Transfer {
  void* caller;
  int64_t device;
  int64_t bytes, room;  // now, and in a run that differs in the state's length alone at most
  Reach reach;
};

// One caller at a time.
class Executor {
 public:
  virtual ~Executor() = default;

  virtual int threads() const = 0;
  // fork() took its threads.
  virtual bool orphaned() const { return false; }
  // Of temporaries and state, a power of two and at least 64.
  virtual int64_t alignment() const = 0;
  virtual std::unique_ptr<Buffer> buffer() const = 0;
  // Copies from buffer to buffer of one device, maybe from another session's; returns when that is done.
  virtual void copy(const std::vector<RowCopy>& copies) = 0;

  // Memory of its own that runs need: how much, whether it is there, and to get it. Throws std::bad_alloc.
  virtual int64_t needed() const = 0;
  virtual int64_t held() const = 0;
  virtual void reserve() = 0;

  // What an argument of kind status points to.
  virtual int64_t status(size_t step) = 0;

  // How kernels get at a tensor of the caller; `kind` is "input" or "output". Throws
  // Error(QG_INVALID_ARGUMENT) if they cannot.
  virtual Reach reach(const char* kind, const Port& port, const Binding& binding) = 0;

  // Copies the inputs that are not directly in reach, runs all steps, in order, copies the outputs and
  // returns when all is done. `times`, by step in nanoseconds, is written if it is not NULL. Throws Error:
  // QG_BAD_DATA for a status that is not 0, OutOfMemory.
  virtual void run(const StepTable& table, const std::vector<Transfer>& inputs,
                   const std::vector<Transfer>& outputs, std::vector<int64_t>* times) = 0;

  // The stream that runs are on, NULL if there is none; and lets runs wait for what another stream has been
  // given so far.
  virtual void* stream() const = 0;
  virtual void wait(void* stream) = 0;
};

// Immutable; executors keep pointing into it.
class Program {
 public:
  virtual ~Program() = default;
  // Where kernels find a value of kind weight.
  virtual int64_t weight(size_t value) const = 0;
  // What `host` lends is for the CPU: threads, and memory of temporaries, state and scratch. Throws
  // std::system_error if the system has no threads left.
  virtual std::unique_ptr<Executor> executor(const Host& host) const = 0;
};

// Lives as long as the process.
class Device {
 public:
  virtual ~Device() = default;
  virtual const std::string& name() const = 0;         // "cpu", "cuda:0"
  virtual const std::string& description() const = 0;  // for people
  virtual Platform platform() const = 0;
  // For errors: "this machine" and "this machine (x86_64)".
  virtual std::string short_text() const = 0;
  virtual std::string text() const = 0;
  // What a variant for it is for, and whether it has one of the features that variants ask for (FORMAT.md).
  virtual std::string_view arch() const = 0;
  virtual bool has(std::string_view feature) const = 0;
  // Keeps pointing into the plan and what it points to. Throws Error.
  virtual std::unique_ptr<Program> program(const Plan& plan, const Variant& variant) const = 0;
};

const Device& cpu_device();

// All devices, the CPU first. `problem` says why there is no GPU among them, and is empty if there is one.
struct Devices {
  std::vector<const Device*> list;
  std::string problem;
};
const Devices& devices();

// "cpu", "cuda" or "cuda:1". Throws Error: QG_INVALID_ARGUMENT for another name, QG_UNSUPPORTED for a device
// that is not there.
const Device& find_device(std::string_view name);

// Throws if a step's status is not 0.
void check_status(const Step& step, int32_t status);

}  // namespace qg

#endif  // QGRAPH_SRC_DEVICE_H_
