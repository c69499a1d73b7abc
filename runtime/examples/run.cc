// Runs an artifact on raw tensors from files: all that a program needs to embed a compiled model.
//
//   qgraph_run model.qg                                           prints inputs and outputs
//   qgraph_run model.qg input_ids=ids.bin:2x7 mask=mask.bin:2x7   runs, writes <output>.bin beside the
//   program
//
// Options: --threads N, --isa NAME, --device NAME (cpu, cuda, cuda:1), --out FOLDER. An input is
// name=file:shape, the file little-endian and dense; the shape of a scalar is empty. For each output its
// shape and the 64-bit FNV-1a checksum of its bytes are printed.
#include <algorithm>
#include <cctype>
#include <cinttypes>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <fstream>
#include <iterator>
#include <map>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "qgraph/qgraph.hpp"

namespace {

using Shape = std::vector<std::int64_t>;

// Memory aligned for any dtype and for vector loads.
struct Buffer {
  explicit Buffer(std::size_t bytes) : data(::operator new(bytes, std::align_val_t{64})), size(bytes) {}
  ~Buffer() { ::operator delete(data, std::align_val_t{64}); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  void* data;
  std::size_t size;
};

struct InputFile {
  std::string path;
  Shape shape;
};

struct Arguments {
  std::string model, isa, device, folder = ".";
  int threads = 0;
  std::map<std::string, InputFile> inputs;
};

std::int64_t parse_integer(const std::string& text) {
  std::size_t used = 0;
  std::int64_t value = std::stoll(text, &used);
  if (used != text.size()) throw std::invalid_argument(text);
  return value;
}

// "ids.bin:2x7" -> {ids.bin, {2, 7}}
InputFile parse_input(const std::string& text) {
  std::size_t colon = text.rfind(':');
  if (colon == std::string::npos) throw std::runtime_error("'" + text + "' is not file:shape");
  InputFile input{text.substr(0, colon), {}};
  for (std::size_t begin = colon + 1; begin < text.size();) {
    std::size_t end = std::min(text.find('x', begin), text.size());
    try {
      input.shape.push_back(parse_integer(text.substr(begin, end - begin)));
    } catch (const std::exception&) {
      throw std::runtime_error("'" + text.substr(colon + 1) + "' is not a shape such as 2x7");
    }
    begin = end + 1;
  }
  return input;
}

Arguments parse(int argc, char** argv) {
  Arguments arguments;
  for (int i = 1; i < argc; ++i) {
    std::string argument = argv[i];
    auto value = [&] {
      if (++i == argc) throw std::runtime_error(argument + " needs a value");
      return std::string(argv[i]);
    };
    if (argument == "--threads") {
      arguments.threads = static_cast<int>(parse_integer(value()));
    } else if (argument == "--isa") {
      arguments.isa = value();
    } else if (argument == "--device") {
      arguments.device = value();
    } else if (argument == "--out") {
      arguments.folder = value();
    } else if (std::size_t equals = argument.find('='); equals != std::string::npos) {
      arguments.inputs[argument.substr(0, equals)] = parse_input(argument.substr(equals + 1));
    } else if (arguments.model.empty()) {
      arguments.model = argument;
    } else {
      throw std::runtime_error("'" + argument + "' is neither an option nor name=file:shape");
    }
  }
  if (arguments.model.empty()) {
    throw std::runtime_error(
        "usage: qgraph_run model.qg [name=file:shape ...] [--threads N] [--isa NAME] [--device NAME] [--out "
        "FOLDER]");
  }
  return arguments;
}

// Bytes of a tensor, at most `limit`, so that a mistaken shape cannot overflow.
std::size_t tensor_bytes(qgraph::TensorInfo const& info, const Shape& shape, std::size_t limit) {
  std::size_t bytes = qg_dtype_size(info.dtype);
  for (std::int64_t size : shape) {
    if (size < 0 || (size > 0 && bytes > limit / static_cast<std::size_t>(size))) {
      throw std::runtime_error("the shape of '" + info.name + "' is negative or too large");
    }
    bytes *= static_cast<std::size_t>(size);
  }
  return bytes;
}

void read_file(const std::string& path, const Buffer& buffer) {
  std::ifstream file(path, std::ios::binary | std::ios::ate);
  if (!file) throw std::runtime_error("cannot read " + path);
  if (static_cast<std::size_t>(file.tellg()) != buffer.size) {
    throw std::runtime_error(path + " has " + std::to_string(file.tellg()) + " bytes, its shape needs " +
                             std::to_string(buffer.size));
  }
  file.seekg(0);
  if (!file.read(static_cast<char*>(buffer.data), static_cast<std::streamsize>(buffer.size))) {
    throw std::runtime_error("cannot read " + path);
  }
}

void write_file(const std::string& path, const Buffer& buffer) {
  std::ofstream file(path, std::ios::binary);
  file.write(static_cast<const char*>(buffer.data), static_cast<std::streamsize>(buffer.size));
  file.close();
  if (!file) throw std::runtime_error("cannot write " + path);
}

std::uint64_t checksum(const Buffer& buffer) {
  std::uint64_t hash = 0xcbf29ce484222325u;
  const unsigned char* bytes = static_cast<const unsigned char*>(buffer.data);
  for (std::size_t i = 0; i < buffer.size; ++i) hash = (hash ^ bytes[i]) * 0x100000001b3u;
  return hash;
}

template <typename Dims>
std::string text(const Dims& dims) {
  std::string joined;
  for (const auto& dim : dims) {
    if (!joined.empty()) joined += ", ";
    if constexpr (std::is_convertible_v<decltype(dim), std::string>) {
      joined += dim;
    } else {
      joined += std::to_string(dim);
    }
  }
  return "[" + joined + "]";
}

void print(const char* kind, const qgraph::TensorInfo& info) {
  std::printf("%s %s: %s %s\n", kind, info.name.c_str(), qg_dtype_name(info.dtype), text(info.dims).c_str());
}

// A tensor's name may hold characters that a file's should not, '/' above all.
std::string file_name(std::string name) {
  for (char& c : name) {
    if (!std::isalnum(static_cast<unsigned char>(c)) && c != '_' && c != '-') c = '_';
  }
  return name + ".bin";
}

void run(const Arguments& arguments) {
  auto given = [](const std::string& text) { return text.empty() ? nullptr : text.c_str(); };
  qgraph::Model model(arguments.model, given(arguments.isa), given(arguments.device));
  const std::vector<qgraph::TensorInfo> inputs = model.inputs(), outputs = model.outputs();
  std::printf("%s: %s on %s\n", arguments.model.c_str(), model.isa().c_str(), model.device().c_str());
  for (const auto& info : inputs) print("input", info);
  for (const auto& info : outputs) print("output", info);
  if (arguments.inputs.empty() && !inputs.empty()) return;

  qgraph::Session session(model, arguments.threads);
  std::map<std::string, InputFile> files = arguments.inputs;
  std::vector<std::unique_ptr<Buffer>> buffers;
  for (std::size_t i = 0; i < inputs.size(); ++i) {
    auto found = files.find(inputs[i].name);
    if (found == files.end()) throw std::runtime_error("input '" + inputs[i].name + "' is not given");
    const InputFile& file = found->second;
    buffers.push_back(std::make_unique<Buffer>(tensor_bytes(inputs[i], file.shape, SIZE_MAX / 2)));
    read_file(file.path, *buffers.back());
    session.bind_input(i, buffers.back()->data, inputs[i].dtype, file.shape);
    files.erase(found);
  }
  if (!files.empty()) throw std::runtime_error("the model has no input '" + files.begin()->first + "'");

  std::vector<std::unique_ptr<Buffer>> results;
  std::vector<Shape> shapes;
  for (std::size_t i = 0; i < outputs.size(); ++i) {
    shapes.push_back(session.output_shape(i));
    results.push_back(std::make_unique<Buffer>(tensor_bytes(outputs[i], shapes[i], SIZE_MAX / 2)));
    session.bind_output(i, results[i]->data, outputs[i].dtype, shapes[i]);
  }
  session.run();
  for (std::size_t i = 0; i < outputs.size(); ++i) {
    std::string path = arguments.folder + "/" + file_name(outputs[i].name);
    write_file(path, *results[i]);
    std::printf("%s %s %016" PRIx64 " -> %s\n", outputs[i].name.c_str(), text(shapes[i]).c_str(),
                checksum(*results[i]), path.c_str());
  }
}

}  // namespace

int main(int argc, char** argv) {
  try {
    run(parse(argc, argv));
    return EXIT_SUCCESS;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "qgraph_run: %s\n", error.what());
    return EXIT_FAILURE;
  }
}
