// A kernel as the machine runs it: instructions whose operation was looked up, operands that name rows of registers.

#ifndef JAX_MOE_EMULATOR_PROGRAM_H_
#define JAX_MOE_EMULATOR_PROGRAM_H_

#include <cstdint>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace emulator {

constexpr int kLanes = 32;
constexpr uint32_t kAllLanes = 0xFFFFFFFFu;

// What is wrong with the program that runs, or with the call; the message is for whoever wrote the kernel.
class Error : public std::runtime_error {
 public:
  explicit Error(const std::string& message, bool says_where = false)
      : std::runtime_error(message), says_where(says_where) {}
  bool says_where;  // the message names an instruction already
};

enum class OperandKind { kRegister, kImmediate, kSpecial, kLabel, kAddress, kParameter, kVector, kNone };

struct Operand {
  OperandKind kind = OperandKind::kNone;
  bool negated = false;        // a predicate
  int bytes = 0;               // of a register: 1 (a predicate), 2, 4 or 8
  int reg = -1;                // a register; of an address its base, -1: none
  int64_t value = 0;           // an immediate's bits, a special register, a branch's target, an address' offset
  std::vector<Operand> items;  // of a vector
};

struct Step;  // machine.h: one instruction of some lanes of a warp

enum class Outcome {
  kNext,     // go on with the next instruction
  kJumped,   // the handler has set where the lanes go on
  kBlocked,  // the handler has set what the lanes wait for; it is called again then
};

using Handler = Outcome (*)(Step&);

struct Operation {
  std::string name;
  Handler handler = nullptr;
  bool aligned = false;  // all lanes of the warp that have not exited execute it together
  int variant = 0;       // for a handler of several operations
};

struct Instruction {
  const Operation* operation = nullptr;
  int guard = -1;
  bool guard_negated = false;
  int line = 0;
  std::vector<Operand> operands;
  std::string text;
};

struct Program {
  std::string name;
  std::vector<Instruction> code;
  std::vector<int> register_bytes;   // 1 (a predicate), 2, 4 or 8
  std::vector<int> register_offset;  // of its row in a warp's registers, in bytes
  int row_bytes = 0;                 // of all rows of a warp
  int parameter_bytes = 0;
  int cta_group = 0;          // of its tcgen05 operations, which all have the same; 0: none
  int static_shared_end = 0;  // address behind the variables in shared memory; dynamic shared memory starts there
};

// The operation of that name; nullptr: the machine does not know it.
const Operation* FindOperation(std::string_view name);

// Names of all operations, for tests.
std::vector<std::string> OperationNames();

// What the files of operations fill in.
void Register(std::string name, Handler handler, bool aligned = false, int variant = 0);

// A program from words and texts (encode.py says how they are laid out).
Program Decode(const int64_t* words, int64_t count, const std::vector<std::string>& texts);

}  // namespace emulator

#endif  // JAX_MOE_EMULATOR_PROGRAM_H_
