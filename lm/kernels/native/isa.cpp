// Compiled once for each instruction set; CMakeLists.txt gives INKLING_ISA and the flags.
#include <cstdlib>
#include <new>

#include "recurrent.hpp"
#include "transformer.hpp"

namespace INKLING_ISA {

inkling::Kernel* recurrent(const inkling::RecurrentParts& parts, const inkling::Settings& settings) {
    return new Recurrent(parts, settings);
}
inkling::Kernel* transformer(const inkling::TransformerParts& parts, const inkling::Settings& settings) {
    return new Transformer(parts, settings);
}

}  // namespace INKLING_ISA
