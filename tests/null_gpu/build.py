"""Compile the null device: a GPU in which torch believes, and which computes nothing.

python -m tests.null_gpu.build FOLDER        # prints the variables to set, for a shell

Shapes, devices, branches, launches, copies, waits and memory of a run on it are real; values, speed
and what NCCL does are not.  Every function that torch imports from CUDA's libraries and that the C
files here do not define becomes a stub that returns 0, so that any torch for CUDA 13 will do.
"""

import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

HERE = Path(__file__).parent
PACKAGES = Path(sysconfig.get_path("purelib"))
INCLUDE = PACKAGES / "nvidia" / "cu13" / "include"
TORCH = PACKAGES / "torch" / "lib"
PRELOADED = ("runtime.c", "libraries.c", "counters.c")
TORCH_LIBRARIES = (
    "libtorch_cuda.so",
    "libc10_cuda.so",
    "libtorch_python.so",
    "libtorch_cuda_linalg.so",
)
STUBBED = re.compile(r"(__)?cuda[A-Z]|cublas|cusolver|nccl")
# Calls that are work on a device, and are counted.
WORK = re.compile(r"gemm|Gemm|Matmul$|gemv|ger|trsm|syrk|nccl(All|Reduce|Broadcast|Send|Recv)")
# Not in the package of headers: for a C compiler these words mean nothing.
HOST_DEFINES = """
#define CUDARTAPI
#define CUDARTAPI_CDECL
#define __builtin_align__(n) __attribute__((aligned(n)))
#define __align__(n) __attribute__((aligned(n)))
#define __device_builtin__
#define __device_builtin_texture_type__
#define __device_builtin_surface_type__
#define __cudart_builtin__
#define __host__
#define __device__
"""
FLAGS = "-O2 -fPIC -shared -Wall -Wno-unused-parameter -Wno-deprecated-declarations".split()
# Triton looks them up when it starts; kernels that we do not have would call them.
OF_TRITON = {
    "cuLinkAddData_v2",
    "cuLinkComplete",
    "cuLinkCreate_v2",
    "cuTensorMapEncodeTiled",
    "cuTensorMapEncodeIm2col",
}


def why_not() -> str | None:
    """Why the device cannot be built here, if it cannot."""
    for tool in ("gcc", "nm"):
        if shutil.which(tool) is None:
            return f"needs {tool}"
    if not (TORCH / "libtorch_cuda.so").exists():
        return "needs a torch for CUDA (no GPU)"
    if not (INCLUDE / "cuda_runtime_api.h").exists():
        return "needs the headers of CUDA 13 that come with torch for CUDA"
    return None


def build(folder: Path) -> dict[str, str]:
    """Compile into a folder.

    Returns:
        Environment variables for a process that shall have the device.
    """
    include, driver = folder / "include", folder / "driver"
    (include / "crt").mkdir(parents=True, exist_ok=True)
    (include / "crt" / "host_defines.h").write_text(HOST_DEFINES)
    driver.mkdir(exist_ok=True)
    library = folder / "libnull_gpu.so"
    wanted = {name for path in TORCH_LIBRARIES for name in imported(path) if STUBBED.match(name)}
    link([HERE / name for name in PRELOADED], library, wanted, "-lpthread")
    wanted = {name for name in imported("libcaffe2_nvrtc.so") if re.match("cu[A-Z]", name)}
    name = "libcuda.so.1"
    link([HERE / "driver.c"], driver / name, wanted | OF_TRITON, f"-Wl,-soname,{name}")
    (driver / "libcuda.so").unlink(missing_ok=True)
    (driver / "libcuda.so").symlink_to(name)
    return {
        "NULL_GPU_LIBRARY": str(library),
        "LD_PRELOAD": str(library),
        "LD_LIBRARY_PATH": str(driver),
        "TRITON_LIBCUDA_PATH": str(driver),
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        "TORCH_CUDNN_SDPA_DEPRIORITIZED": "1",  # cuDNN's own library would look for a device
    }


def link(sources: list[Path], library: Path, wanted: set[str], *flags: str) -> None:
    """Compile a library, with stubs for those of the wanted functions that the sources have not."""
    includes = [HERE, INCLUDE, library.parent / "include", library.parent.parent / "include"]
    command = ["gcc", *FLAGS, *(f"-I{path}" for path in includes), "-o", str(library)]
    command += map(str, sources)
    subprocess.run([*command, *flags], check=True)
    stubs = library.with_suffix(".stubs.c")
    stubs.write_text(make_stubs(wanted - symbols(library, "defined-only")))
    subprocess.run([*command, str(stubs), *flags], check=True)


def symbols(path: Path, kind: str) -> set[str]:
    """Names of the dynamic symbols of a library, without their versions."""
    command = ["nm", "-D", f"--{kind}", str(path)]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    return {line.split()[-1].partition("@")[0] for line in lines}


def imported(name: str) -> set[str]:
    """What a library of torch takes from others; nothing if it is not there."""
    path = TORCH / name
    return symbols(path, "undefined-only") if path.exists() else set()


def make_stubs(names: set[str]) -> str:
    """C functions that return 0; those that are work are counted."""
    lines = ["void null_count_call(const char *);"]
    for name in sorted(names):
        count = f'null_count_call("{name}"); ' if WORK.search(name) else ""
        lines.append(f"int {name}(void) {{ {count}return 0; }}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    if reason := why_not():
        sys.exit(f"The null GPU cannot be built: {reason}.")
    target = Path(sys.argv[1]).absolute()
    target.mkdir(parents=True, exist_ok=True)
    for key, value in build(target).items():
        print(f"export {key}={value}")
