#include "cuda_device.h"

#include <string>

#include "cuda_driver.h"
#include "cuda_program.h"

namespace qg::cuda {
namespace {

// The number of "sm_90" or "sm_90a" behind the prefix; -1 if it is none.
int number(std::string_view digits) {
  if (digits.size() < 2 || digits.size() > 4) return -1;
  int value = 0;
  for (char c : digits) {
    if (c < '0' || c > '9') return -1;
    value = 10 * value + (c - '0');
  }
  return value;
}

class Gpu final : public Device {
 public:
  Gpu(const Driver& driver, Ordinal ordinal) : ordinal_(ordinal), name_(cat("cuda:", ordinal)) {
    auto checked = [this](Result result) { check(result, "cannot ask for the properties of ", name_); };
    int device = 0;
    char model[256] = "";
    size_t bytes = 0;
    checked(driver.device_get(&device, ordinal));
    checked(driver.device_name(model, sizeof(model) - 1, device));
    checked(driver.device_memory(&bytes, device));
    checked(driver.device_attribute(&major_, kComputeCapabilityMajor, device));
    checked(driver.device_attribute(&minor_, kComputeCapabilityMinor, device));
    constexpr size_t kGiB = size_t{1} << 30;
    capability_ = cat(model, ", compute capability ", major_, ".", minor_);
    description_ = cat(capability_, ", ", (bytes + kGiB / 2) / kGiB, " GiB");
  }

  const std::string& name() const override { return name_; }
  const std::string& description() const override { return description_; }
  Platform platform() const override { return Platform::kCuda; }
  std::string short_text() const override { return name_; }
  std::string text() const override { return cat(name_, " (", capability_, ")"); }
  std::string_view arch() const override { return "cuda"; }
  bool has(std::string_view feature) const override { return has_feature(major_, minor_, feature); }
  std::unique_ptr<Program> program(const Plan& plan, const Variant& variant) const override {
    return std::make_unique<CudaProgram>(driver(), ordinal_, plan, variant);
  }

 private:
  Ordinal ordinal_;
  std::string name_, capability_, description_;
  int major_ = 0, minor_ = 0;
};

}  // namespace

bool has_feature(int major, int minor, std::string_view feature) {
  int own = 10 * major + minor;
  if (feature.substr(0, 4) == "ptx_") {
    int wanted = number(feature.substr(4));
    return wanted >= 0 && wanted <= own;
  }
  if (feature.substr(0, 3) != "sm_") return false;
  bool exact = feature.back() == 'a';
  int wanted = number(feature.substr(3, feature.size() - 3 - exact));
  return exact ? wanted == own : wanted / 10 == major && wanted >= 0 && wanted <= own;
}

const std::vector<const Device*>& gpus() {
  static const std::vector<const Device*>& found = *[] {
    const Driver& driver = cuda::driver();
    int count = 0;
    check(driver.device_count(&count), "cannot count GPUs");
    auto* fresh = new std::vector<const Device*>;  // never destroyed: models may outlive main()
    for (Ordinal i = 0; i < count; ++i) fresh->push_back(new Gpu(driver, i));
    return fresh;
  }();
  return found;
}

}  // namespace qg::cuda
