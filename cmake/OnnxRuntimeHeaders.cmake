# Sets ONNXRUNTIME_INCLUDE_DIR, the folder of onnxruntime_c_api.h, and says where it came from: given by
# -DONNXRUNTIME_INCLUDE_DIR, else an installed system package, else brought once into the build folder.
set(ONNXRUNTIME_INCLUDE_DIR "" CACHE PATH "The folder of onnxruntime_c_api.h; empty: find or fetch it")

if(ONNXRUNTIME_INCLUDE_DIR)
  if(NOT EXISTS "${ONNXRUNTIME_INCLUDE_DIR}/onnxruntime_c_api.h")
    message(FATAL_ERROR "ONNXRUNTIME_INCLUDE_DIR is ${ONNXRUNTIME_INCLUDE_DIR}, which has no onnxruntime_c_api.h")
  endif()
  set(ORT_HEADERS_ORIGIN "given by -DONNXRUNTIME_INCLUDE_DIR")
else()
  find_path(ORT_SYSTEM_INCLUDE_DIR onnxruntime_c_api.h PATH_SUFFIXES onnxruntime onnxruntime/core/session)
  if(ORT_SYSTEM_INCLUDE_DIR)
    set(ONNXRUNTIME_INCLUDE_DIR "${ORT_SYSTEM_INCLUDE_DIR}")
    set(ORT_HEADERS_ORIGIN "an installed system package")
  else()
    set(ONNXRUNTIME_INCLUDE_DIR "${CMAKE_BINARY_DIR}/onnxruntime_headers")
    set(ORT_HEADERS_STAMP "${ONNXRUNTIME_INCLUDE_DIR}/origin.txt")
    if(NOT EXISTS "${ORT_HEADERS_STAMP}")
      find_package(Python3 REQUIRED COMPONENTS Interpreter)
      message(STATUS "ONNX Runtime headers: fetching")
      execute_process(
        COMMAND "${Python3_EXECUTABLE}" "${CMAKE_CURRENT_LIST_DIR}/fetch_onnxruntime_headers.py" --output
                "${ONNXRUNTIME_INCLUDE_DIR}"
        OUTPUT_VARIABLE ORT_HEADERS_OUTPUT
        ERROR_VARIABLE ORT_HEADERS_ERROR
        RESULT_VARIABLE ORT_HEADERS_RESULT
        OUTPUT_STRIP_TRAILING_WHITESPACE)
      if(NOT ORT_HEADERS_RESULT EQUAL 0)
        message(FATAL_ERROR "ONNX Runtime headers could not be brought here:\n${ORT_HEADERS_ERROR}\n"
                            "Install libonnxruntime-dev, or give -DONNXRUNTIME_INCLUDE_DIR=<folder of onnxruntime_c_api.h>.")
      endif()
      file(WRITE "${ORT_HEADERS_STAMP}" "${ORT_HEADERS_OUTPUT}")
    endif()
    file(READ "${ORT_HEADERS_STAMP}" ORT_HEADERS_ORIGIN)
  endif()
endif()

file(STRINGS "${ONNXRUNTIME_INCLUDE_DIR}/onnxruntime_c_api.h" ORT_API_LINE REGEX "#define ORT_API_VERSION")
string(REGEX MATCH "[0-9]+" ORT_HEADERS_API "${ORT_API_LINE}")
if(ORT_HEADERS_API LESS 18)
  message(FATAL_ERROR "The ONNX Runtime headers in ${ONNXRUNTIME_INCLUDE_DIR} have API ${ORT_HEADERS_API}; 18 or newer is needed")
endif()
message(STATUS "ONNX Runtime headers: API ${ORT_HEADERS_API}, ${ORT_HEADERS_ORIGIN}")
