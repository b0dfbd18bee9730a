# SPDX-License-Identifier: Apache-2.0

# The hot loops of a library: one source, one object per instruction set, chosen at run time (common/isa.h). Makes
# <name>_baseline, <name>_avx2, <name>_avx512 and, with all of them, <name>_objects. No contraction: where products and
# sums are fused is written in the source.
if(PT_X86_KERNELS AND CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64)$")
  set(PT_HAVE_X86_KERNELS ON)
else()
  set(PT_HAVE_X86_KERNELS OFF)
endif()

function(pt_add_isa_object name isa sources options)
  add_library(${name}_${isa} OBJECT ${sources})
  target_include_directories(${name}_${isa} PRIVATE ${PROJECT_SOURCE_DIR}/include ${PROJECT_SOURCE_DIR}/src)
  target_compile_definitions(${name}_${isa} PRIVATE PT_KERNELS_ISA=${isa})
  target_compile_options(${name}_${isa} PRIVATE ${options} -ffp-contract=off -fno-math-errno ${ARGN})
  target_link_libraries(${name}_${isa} PRIVATE pt_options)
  target_sources(${name}_objects INTERFACE $<TARGET_OBJECTS:${name}_${isa}>)
endfunction()

function(pt_add_isa_kernels name)
  cmake_parse_arguments(arg "" "" "SOURCES;OPTIONS" ${ARGN})
  add_library(${name}_objects INTERFACE)
  if(PT_HAVE_X86_KERNELS)
    pt_add_isa_object(${name} baseline "${arg_SOURCES}" "${arg_OPTIONS}" -march=x86-64 -mtune=generic)
    pt_add_isa_object(${name} avx2 "${arg_SOURCES}" "${arg_OPTIONS}" -march=x86-64-v3 -mtune=generic)
    pt_add_isa_object(${name} avx512 "${arg_SOURCES}" "${arg_OPTIONS}" -march=x86-64-v4 -mtune=generic
                      -mprefer-vector-width=512)
  else()
    pt_add_isa_object(${name} baseline "${arg_SOURCES}" "${arg_OPTIONS}")
  endif()
endfunction()

# A library twice: static, because the C++ tests reach inside, and shared for the package.
function(pt_add_plugin name static_name)
  cmake_parse_arguments(arg "" "" "SOURCES;LINK;PRIVATE_LINK" ${ARGN})
  add_library(${static_name} STATIC ${arg_SOURCES})
  target_include_directories(${static_name} PUBLIC ${PROJECT_SOURCE_DIR}/include ${PROJECT_SOURCE_DIR}/src)
  target_compile_definitions(${static_name} PUBLIC $<$<BOOL:${PT_HAVE_X86_KERNELS}>:PT_HAVE_X86_KERNELS>)
  target_link_libraries(${static_name} PUBLIC pt_options ${arg_LINK} PRIVATE ${arg_PRIVATE_LINK})
  add_library(${name} SHARED $<TARGET_OBJECTS:${static_name}>)
  target_link_libraries(${name} PRIVATE pt_options ${arg_LINK} ${arg_PRIVATE_LINK})
  target_link_options(${name} PRIVATE -Wl,--no-undefined)
  if(PT_SANITIZE)
    set_target_properties(${name} PROPERTIES EXCLUDE_FROM_ALL ON)  # cannot be loaded into a plain Python
  else()
    # scikit-build-core installs below its wheel root, next to the Python package.
    install(TARGETS ${name} LIBRARY DESTINATION pt_trtllm/lib)
  endif()
endfunction()
