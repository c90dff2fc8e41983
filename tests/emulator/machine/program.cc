#include "program.h"

#include <map>

namespace emulator {

void RegisterIntegers();
void RegisterFloats();
void RegisterConversions();
void RegisterControl();
void RegisterMemory();
void RegisterWarpOperations();
void RegisterBarriers();
void RegisterCopies();
void RegisterWgmma();
void RegisterMatrices();
void RegisterTensorMemory();
void RegisterTensorProducts();
void RegisterPairs();

namespace {

std::map<std::string, Operation, std::less<>>& Table() {
  static auto* table = new std::map<std::string, Operation, std::less<>>;
  return *table;
}

const std::map<std::string, Operation, std::less<>>& FilledTable() {
  static const bool filled = [] {
    RegisterIntegers();
    RegisterFloats();
    RegisterConversions();
    RegisterControl();
    RegisterMemory();
    RegisterWarpOperations();
    RegisterBarriers();
    RegisterCopies();
    RegisterWgmma();
    RegisterMatrices();
    RegisterTensorMemory();
    RegisterTensorProducts();
    RegisterPairs();
    return true;
  }();
  static_cast<void>(filled);
  return Table();
}

class Reader {
 public:
  Reader(const int64_t* words, int64_t count) : at_(words), end_(words + count) {}

  int64_t Next() {
    if (at_ == end_) throw Error("a program has too few words");
    return *at_++;
  }
  int NextInt() { return static_cast<int>(Next()); }

  Operand NextOperand() {
    Operand operand;
    operand.kind = static_cast<OperandKind>(Next());
    operand.negated = Next() != 0;
    operand.bytes = NextInt();
    operand.reg = NextInt();
    operand.value = Next();
    const int64_t items = Next();
    for (int64_t i = 0; i < items; ++i) operand.items.push_back(NextOperand());
    return operand;
  }

 private:
  const int64_t* at_;
  const int64_t* end_;
};

}  // namespace

void Register(std::string name, Handler handler, bool aligned, int variant) {
  const auto [entry, is_new] = Table().emplace(name, Operation{name, handler, aligned, variant});
  if (!is_new) throw Error("the table has " + name + " twice");
}

const Operation* FindOperation(std::string_view name) {
  const auto& table = FilledTable();
  const auto found = table.find(name);
  return found == table.end() ? nullptr : &found->second;
}

std::vector<std::string> OperationNames() {
  std::vector<std::string> names;
  for (const auto& [name, operation] : FilledTable()) names.push_back(name);
  return names;
}

Program Decode(const int64_t* words, int64_t count, const std::vector<std::string>& texts) {
  Reader reader(words, count);
  Program program;
  program.name = texts.at(static_cast<size_t>(reader.Next()));
  program.parameter_bytes = reader.NextInt();
  program.static_shared_end = reader.NextInt();
  const int64_t registers = reader.Next();
  for (int64_t i = 0; i < registers; ++i) {
    const int bytes = reader.NextInt();
    program.register_bytes.push_back(bytes);
    program.register_offset.push_back(program.row_bytes);
    program.row_bytes += bytes == 1 ? 0 : bytes == 8 ? 8 * kLanes : 4 * kLanes;  // predicates are bits elsewhere
  }
  const int64_t instructions = reader.Next();
  for (int64_t i = 0; i < instructions; ++i) {
    Instruction instruction;
    const std::string& operation = texts.at(static_cast<size_t>(reader.Next()));
    instruction.text = texts.at(static_cast<size_t>(reader.Next()));
    instruction.line = reader.NextInt();
    instruction.guard = reader.NextInt();
    instruction.guard_negated = reader.Next() != 0;
    instruction.operation = FindOperation(operation);
    if (instruction.operation == nullptr) {
      throw Error(program.name + " line " + std::to_string(instruction.line) + ": the emulator does not know " +
                  operation + ": " + instruction.text);
    }
    if (const size_t at = operation.find("cta_group::"); at != std::string::npos) {
      const int group = operation[at + 11] - '0';
      if (program.cta_group != 0 && group != program.cta_group) {
        throw Error(program.name + " line " + std::to_string(instruction.line) +
                    ": not the .cta_group of those before: " + instruction.text);
      }
      program.cta_group = group;
    }
    const int64_t operands = reader.Next();
    for (int64_t j = 0; j < operands; ++j) instruction.operands.push_back(reader.NextOperand());
    program.code.push_back(std::move(instruction));
  }
  return program;
}

}  // namespace emulator
