// The part of ONNX Runtime's C ABI that a library of custom operators needs: ONNX Runtime 1.17 or later.
//
// Declared here because ONNX Runtime's packages for Python come without headers. The ABI only grows: a
// function of `OrtApi` keeps its place, and members of `OrtCustomOp` are read up to those of its `version`.
// Names are those of onnxruntime_c_api.h, which says what the functions do.
#ifndef QGRAPH_ORT_ONNXRUNTIME_ABI_H_
#define QGRAPH_ORT_ONNXRUNTIME_ABI_H_

#include <cstddef>
#include <cstdint>

extern "C" {

struct OrtStatus;
struct OrtValue;
struct OrtTensorTypeAndShapeInfo;
struct OrtSessionOptions;
struct OrtCustomOpDomain;
struct OrtKernelInfo;
struct OrtKernelContext;
struct OrtShapeInferContext;

constexpr uint32_t kOrtApiVersion = 17;  // KernelContext_ParallelFor

enum OrtErrorCode : int { ORT_FAIL = 1, ORT_INVALID_ARGUMENT = 2 };

enum ONNXTensorElementDataType : int {
  ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED = 0,  // of a custom operator's input: any
  ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT = 1,
  ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8 = 2,
  ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32 = 6,
  ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64 = 7,
};

enum OrtCustomOpInputOutputCharacteristic : int { INPUT_OUTPUT_REQUIRED = 0 };
enum OrtMemType : int { OrtMemTypeDefault = 0 };

struct OrtCustomOp;

// A table of functions, of which the ones in gaps are not used.
struct OrtApi {
  using Unused = void (*)();
  OrtStatus* (*CreateStatus)(OrtErrorCode code, const char* message);
  Unused gap1[25];
  OrtStatus* (*CreateCustomOpDomain)(const char* domain, OrtCustomOpDomain** out);
  OrtStatus* (*CustomOpDomain_Add)(OrtCustomOpDomain* domain, const OrtCustomOp* op);
  OrtStatus* (*AddCustomOpDomain)(OrtSessionOptions* options, OrtCustomOpDomain* domain);
  Unused gap29[22];
  OrtStatus* (*GetTensorMutableData)(OrtValue* value, void** out);
  Unused gap52[8];
  OrtStatus* (*GetTensorElementType)(const OrtTensorTypeAndShapeInfo* info, ONNXTensorElementDataType* out);
  OrtStatus* (*GetDimensionsCount)(const OrtTensorTypeAndShapeInfo* info, size_t* out);
  OrtStatus* (*GetDimensions)(const OrtTensorTypeAndShapeInfo* info, int64_t* dims, size_t count);
  Unused gap63[1];
  OrtStatus* (*GetTensorShapeElementCount)(const OrtTensorTypeAndShapeInfo* info, size_t* out);
  OrtStatus* (*GetTensorTypeAndShape)(const OrtValue* value, OrtTensorTypeAndShapeInfo** out);
  Unused gap66[24];
  OrtStatus* (*KernelContext_GetInput)(const OrtKernelContext* context, size_t index, const OrtValue** out);
  OrtStatus* (*KernelContext_GetOutput)(OrtKernelContext* context, size_t index, const int64_t* dims,
                                        size_t count, OrtValue** out);
  Unused gap92[1];
  void (*ReleaseStatus)(OrtStatus* status);
  Unused gap94[5];
  void (*ReleaseTensorTypeAndShapeInfo)(OrtTensorTypeAndShapeInfo* info);
  Unused gap100[144];
  OrtStatus* (*KernelInfo_GetNodeName)(const OrtKernelInfo* info, char* out, size_t* size);
  Unused gap245[4];
  OrtStatus* (*KernelInfoGetConstantInput_tensor)(const OrtKernelInfo* info, size_t index, int* is_constant,
                                                  const OrtValue** out);
  Unused gap250[24];
  OrtStatus* (*KernelContext_ParallelFor)(const OrtKernelContext* context, void (*task)(void*, size_t),
                                          size_t total, size_t batches, void* data);
};

struct OrtApiBase {
  const OrtApi* (*GetApi)(uint32_t version);  // nullptr: older than that
  const char* (*GetVersionString)();
};

// Up to the members of version 17.
struct OrtCustomOp {
  uint32_t version;
  void* (*CreateKernel)(const OrtCustomOp* op, const OrtApi* api, const OrtKernelInfo* info);
  const char* (*GetName)(const OrtCustomOp* op);
  const char* (*GetExecutionProviderType)(const OrtCustomOp* op);
  ONNXTensorElementDataType (*GetInputType)(const OrtCustomOp* op, size_t index);
  size_t (*GetInputTypeCount)(const OrtCustomOp* op);
  ONNXTensorElementDataType (*GetOutputType)(const OrtCustomOp* op, size_t index);
  size_t (*GetOutputTypeCount)(const OrtCustomOp* op);
  void (*KernelCompute)(void* kernel, OrtKernelContext* context);
  void (*KernelDestroy)(void* kernel);
  OrtCustomOpInputOutputCharacteristic (*GetInputCharacteristic)(const OrtCustomOp* op, size_t index);
  OrtCustomOpInputOutputCharacteristic (*GetOutputCharacteristic)(const OrtCustomOp* op, size_t index);
  OrtMemType (*GetInputMemoryType)(const OrtCustomOp* op, size_t index);
  int (*GetVariadicInputMinArity)(const OrtCustomOp* op);
  int (*GetVariadicInputHomogeneity)(const OrtCustomOp* op);
  int (*GetVariadicOutputMinArity)(const OrtCustomOp* op);
  int (*GetVariadicOutputHomogeneity)(const OrtCustomOp* op);
  OrtStatus* (*CreateKernelV2)(const OrtCustomOp* op, const OrtApi* api, const OrtKernelInfo* info,
                               void** kernel);
  OrtStatus* (*KernelComputeV2)(void* kernel, OrtKernelContext* context);
  OrtStatus* (*InferOutputShapeFn)(const OrtCustomOp* op, OrtShapeInferContext* context);
  int (*GetStartVersion)(const OrtCustomOp* op);
  int (*GetEndVersion)(const OrtCustomOp* op);
};

// What ONNX Runtime calls when it loads the library.
__attribute__((visibility("default"))) OrtStatus* RegisterCustomOps(OrtSessionOptions* options,
                                                                    const OrtApiBase* base);

}  // extern "C"

#define QG_ORT_PLACE(function, place) \
  static_assert(offsetof(OrtApi, function) == (place) * sizeof(void (*)()), "a gap has another size")
QG_ORT_PLACE(CreateCustomOpDomain, 26);
QG_ORT_PLACE(GetTensorMutableData, 51);
QG_ORT_PLACE(GetTensorElementType, 60);
QG_ORT_PLACE(GetTensorTypeAndShape, 65);
QG_ORT_PLACE(KernelContext_GetInput, 90);
QG_ORT_PLACE(ReleaseStatus, 93);
QG_ORT_PLACE(ReleaseTensorTypeAndShapeInfo, 99);
QG_ORT_PLACE(KernelInfo_GetNodeName, 244);
QG_ORT_PLACE(KernelInfoGetConstantInput_tensor, 249);
QG_ORT_PLACE(KernelContext_ParallelFor, 274);
#undef QG_ORT_PLACE

#endif  // QGRAPH_ORT_ONNXRUNTIME_ABI_H_
