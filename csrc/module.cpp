// pydl._C: facts about the build. It holds no ops; pydl works without it.

#include <pybind11/pybind11.h>

#if __has_include("common/isa.h") && PYDL_HAS_ISA
#include "common/isa.h"
#define PYDL_CPU_LEVEL pydl::cpu_level()
#endif

namespace py = pybind11;

namespace {

// The libraries' own facts lie in a file beside them, because they are built independently of this module.
py::dict read_facts() {
  py::object self = py::module_::import("pathlib").attr("Path")(py::module_::import("pydl._C").attr("__file__"));
  py::object path = self.attr("with_name")("_lib").attr("joinpath")("build.json");
  if (!path.attr("is_file")().cast<bool>()) {
    return py::dict();
  }
  return py::module_::import("json").attr("loads")(path.attr("read_text")());
}

py::dict build_info() {
  py::dict info = read_facts();
  if (info.contains("kernels")) {
    info.attr("pop")("kernels");
  }
  info["extension_version"] = PYDL_VERSION;
  info["extension_compiler"] = __VERSION__;
  info["extension_flags"] = PYDL_CXXFLAGS;
  info["extension_torch_version"] = PYDL_TORCH_VERSION;
  info["extension_torch_target"] = PYDL_TARGET;
  return info;
}

py::object cpu_capability() {
#ifdef PYDL_CPU_LEVEL
  static const char* const names[] = {"baseline", "avx2", "avx512"};
  return py::str(names[PYDL_CPU_LEVEL]);
#else
  return py::none();
#endif
}

py::list kernel_resources() {
  py::dict facts = read_facts();
  return facts.contains("kernels") ? facts["kernels"].cast<py::list>() : py::list();
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Facts about pydl's native build.";
  m.def("build_info", &build_info,
        "How the libraries (compiler, flags, ISA levels, CUDA targets, torch, commit) and this extension were built.");
  m.def("cpu_capability", &cpu_capability,
        "Level the CPU kernels run at: 'baseline', 'avx2' or 'avx512' (PYDL_CPU_CAPABILITY lowers it).");
  m.def("kernel_resources", &kernel_resources,
        "One dict per CUDA kernel and target: source, kernel, arch, registers, spill_stores, spill_loads, stack, "
        "shared.");
}
