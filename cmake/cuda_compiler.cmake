# Finds an nvcc that can compile the kernels, and the architectures to compile them for.

# The list for an nvcc of this version, newest last: it is compiled as PTX too, for later GPUs.
# Empty if that nvcc is too old: 12.1 is the first that passes tables of 32 KB to a kernel.
function(cuda_architectures_for version result)
  if(version VERSION_LESS 12.1)
    set(list "")
  elseif(version VERSION_LESS 12.8)  # the first that knows sm_100
    set(list 80-real 90)
  else()
    set(list 80-real 90-real 100)
  endif()
  set(${result} "${list}" PARENT_SCOPE)
endfunction()

# "80-real;90" as people say it, and as flags of nvcc.
function(describe_cuda_architectures list words flags)
  set(names "")
  set(options "")
  foreach(entry IN LISTS list)
    string(REGEX REPLACE "-.*" "" arch "${entry}")
    if(entry MATCHES "^[0-9]+[af]?$")
      list(APPEND names "sm_${arch}" "compute_${arch}")
      list(APPEND options "-gencode=arch=compute_${arch},code=[compute_${arch},sm_${arch}]")
    elseif(entry MATCHES "^[0-9]+[af]?-real$")
      list(APPEND names "sm_${arch}")
      list(APPEND options "-gencode=arch=compute_${arch},code=sm_${arch}")
    elseif(entry MATCHES "^[0-9]+[af]?-virtual$")
      list(APPEND names "compute_${arch}")
      list(APPEND options "-gencode=arch=compute_${arch},code=compute_${arch}")
    else()  # native, all, all-major
      list(APPEND names "${entry}")
      list(APPEND options "-arch=${entry}")
    endif()
  endforeach()
  list(JOIN names " " names)
  set(${words} "${names}" PARENT_SCOPE)
  set(${flags} "${options}" PARENT_SCOPE)
endfunction()

# Where CMake's own check looks too: CUDACXX, PATH, CUDA_PATH.
function(find_nvcc result)
  if(CMAKE_CUDA_COMPILER)
    set(nvcc "${CMAKE_CUDA_COMPILER}")
  elseif(NOT "$ENV{CUDACXX}" STREQUAL "")
    set(nvcc "$ENV{CUDACXX}")
  else()
    # A build folder keeps what was found, which may have been deleted or moved since.
    unset(NVCC_PROGRAM CACHE)
    find_program(NVCC_PROGRAM nvcc PATHS ENV PATH ENV CUDA_PATH PATH_SUFFIXES bin NO_DEFAULT_PATH)
    set(nvcc "${NVCC_PROGRAM}")
  endif()
  set(${result} "${nvcc}" PARENT_SCOPE)
endfunction()

# Whether this machine has an NVIDIA GPU, or none that shows: a device file, or what the driver's own
# program lists, which is how one shows under Windows.
function(find_gpu result)
  file(GLOB devices /dev/nvidia[0-9]* /dev/nvhost-gpu)
  set(seen "${devices}")
  if(NOT seen)
    unset(NVIDIA_SMI_PROGRAM CACHE)
    find_program(NVIDIA_SMI_PROGRAM nvidia-smi PATHS ENV PATH /usr/lib/wsl/lib NO_DEFAULT_PATH)
    if(NVIDIA_SMI_PROGRAM)
      execute_process(COMMAND "${NVIDIA_SMI_PROGRAM}" -L OUTPUT_VARIABLE said ERROR_QUIET
                      RESULT_VARIABLE failed)
      if(NOT failed AND said MATCHES "GPU [0-9]+:")
        set(seen "${said}")
      endif()
    endif()
  endif()
  if(seen)
    set(${result} TRUE PARENT_SCOPE)
  else()
    set(${result} FALSE PARENT_SCOPE)
  endif()
endfunction()

# Sets in the caller: `problem`, why CUDA cannot be built, or empty; and then CMAKE_CUDA_COMPILER,
# CMAKE_CUDA_ARCHITECTURES (CUDAARCHS, if that is set) and CUDA_ARCHITECTURES, the same in words.
# A program is compiled and linked before CMake's own check, which would end the whole build.
function(find_usable_cuda problem)
  set(${problem} "" PARENT_SCOPE)
  find_nvcc(nvcc)
  if(NOT nvcc)
    set(${problem} "no nvcc was found; put it on PATH" PARENT_SCOPE)
    return()
  endif()
  execute_process(COMMAND "${nvcc}" --version OUTPUT_VARIABLE said ERROR_VARIABLE said
                  RESULT_VARIABLE failed)
  if(failed OR NOT said MATCHES "release ([0-9]+\\.[0-9]+)")
    set(${problem} "${nvcc} does not tell its version" PARENT_SCOPE)
    return()
  endif()
  set(version "${CMAKE_MATCH_1}")

  cuda_architectures_for(${version} architectures)
  if(NOT architectures)
    set(${problem} "nvcc ${version} (${nvcc}) is too old; 12.1 is the first that will do"
        PARENT_SCOPE)
    return()
  endif()
  if(CMAKE_CUDA_ARCHITECTURES)
    set(architectures "${CMAKE_CUDA_ARCHITECTURES}")
  elseif(NOT "$ENV{CUDAARCHS}" STREQUAL "")
    set(architectures "$ENV{CUDAARCHS}")
  endif()
  describe_cuda_architectures("${architectures}" words flags)

  set(folder "${CMAKE_CURRENT_BINARY_DIR}/cuda_check")
  file(MAKE_DIRECTORY "${folder}")
  set(host "")
  if(CMAKE_CUDA_HOST_COMPILER)
    set(host "-ccbin=${CMAKE_CUDA_HOST_COMPILER}")
  elseif(NOT "$ENV{CUDAHOSTCXX}" STREQUAL "")
    set(host "-ccbin=$ENV{CUDAHOSTCXX}")
  endif()
  execute_process(
    COMMAND "${nvcc}" -std=c++17 -cudart static ${host} ${flags} -o check
            "${CMAKE_CURRENT_FUNCTION_LIST_DIR}/cuda_check.cu"
    WORKING_DIRECTORY "${folder}" OUTPUT_VARIABLE said ERROR_VARIABLE said RESULT_VARIABLE failed)
  if(failed)
    string(STRIP "${said}" said)
    set(${problem} "nvcc ${version} (${nvcc}) does not compile for ${words}:\n${said}" PARENT_SCOPE)
    return()
  endif()
  set(CMAKE_CUDA_COMPILER "${nvcc}" PARENT_SCOPE)
  set(CMAKE_CUDA_ARCHITECTURES "${architectures}" PARENT_SCOPE)
  set(CUDA_ARCHITECTURES "${words}" PARENT_SCOPE)
endfunction()
