# Fails if two objects for different instruction sets define one weak symbol: the linker keeps the first definition for
# all, and a processor may then run instructions that it does not have.
#
#   cmake -DNM=nm -DOBJECTS=isa_plain.o,isa_avx2.o -P check_symbols.cmake
cmake_minimum_required(VERSION 3.18)
string(REPLACE "," ";" objects "${OBJECTS}")
set(seen)
foreach(object ${objects})
  execute_process(COMMAND ${NM} ${object} OUTPUT_VARIABLE listed COMMAND_ERROR_IS_FATAL ANY)
  string(REGEX MATCHALL "[0-9a-fA-F]+ [VWu] [^\n]+" symbols "${listed}")
  foreach(symbol ${symbols})
    string(REGEX REPLACE "^[^ ]+ . " "" name "${symbol}")
    # DW.ref.*: a pointer to a function of the C++ library, equal in all objects.
    if(name MATCHES "^DW\\.ref\\.")
      continue()
    endif()
    if(name IN_LIST seen)
      message(FATAL_ERROR "${object} and another instruction set both define the weak symbol ${name}")
    endif()
    list(APPEND seen ${name})
  endforeach()
endforeach()
