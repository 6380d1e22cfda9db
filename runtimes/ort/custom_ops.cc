// The kernel library as ONNX Runtime custom ops, domain "ai.qsparse". Each op is a thin wrapper: it reads attributes
// and checks shapes, the kernels do the rest. Semantics: runtimes/kernels/include/qsk/*.h.
#include <mutex>
#include <string>
#include <vector>

#include "op_kernel.h"

namespace qsparse_ort {
namespace {

// ORT keeps pointers to the domain as long as a session uses it, and does not say when that ends.
void keep(OrtCustomOpDomain* domain) {
  static std::mutex mutex;
  static auto* domains = new std::vector<OrtCustomOpDomain*>;
  const std::lock_guard<std::mutex> lock(mutex);
  domains->push_back(domain);
}

}  // namespace
}  // namespace qsparse_ort

extern "C" QSK_API OrtStatus* ORT_API_CALL RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
  using namespace qsparse_ort;
  const OrtApi* api = base->GetApi(kApiVersion);
  if (api == nullptr) {  // an error status: nullptr would mean success, and the slow function bodies would run silently
    return base->GetApi(1)->CreateStatus(
        ORT_NOT_IMPLEMENTED, (std::string("the ai.qsparse custom ops need ONNX Runtime 1.") +
                              std::to_string(kApiVersion) + " or newer; this is " + base->GetVersionString())
                                 .c_str());
  }
  inference_api = api;
  OrtCustomOpDomain* domain = nullptr;
  QSPARSE_RETURN_IF_ERROR(api->CreateCustomOpDomain("ai.qsparse", &domain));
  keep(domain);
  std::vector<std::vector<const OrtCustomOp*>> all = {topk_ops(), ternary_ops(), sparse_matmul_ops(), head_ops(),
                                                      decoder_ops()};
#ifdef QSPARSE_WITH_CUDA  // libqsparse_ort_cuda: a session takes a domain from one library only
  all.push_back(cuda_ops());
#endif
  for (const auto& ops : all) {
    for (const OrtCustomOp* op : ops) QSPARSE_RETURN_IF_ERROR(api->CustomOpDomain_Add(domain, op));
  }
  return api->AddCustomOpDomain(options, domain);
}
