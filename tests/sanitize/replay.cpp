/* Makes recorded calls of the CPU library again and compares what it gives with what was recorded, bit for bit.
 *
 *   replay LIBRARY CORPUS heap,end,start      each record, at each level, with its operands in such memory
 *   replay LIBRARY CORPUS threads [COUNT]     all records on COUNT threads at once, which share what is only read
 *   replay LIBRARY CORPUS cut,MODE RECORD BLOCK   one record, one of its blocks a byte too short: a fault to be found
 *
 * heap: every operand is an allocation of exactly its bytes, between which AddressSanitizer sees. end, start: it ends or
 * begins at a page that cannot be read, which also masked loads and gathers meet, that GCC does not instrument. What a
 * call writes is 0xff before, which is NaN as a number: bytes that it leaves out differ from the record, and so does
 * what depends on them. What it only reads must be as it was.
 *
 * Exit code 0: all is as recorded; 1: it differs; 2: bad usage. A sanitizer ends the process with a code of its own. */
#include <dlfcn.h>
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <type_traits>
#include <utility>

#include "../../csrc/pk_abi.h"
#include "corpus.h"
#include "team.h"

extern "C" __attribute__((weak)) void __sanitizer_set_death_callback(void (*)());

namespace {
// ---- the functions --------------------------------------------------------------------------------------------------
struct Value {
    int64_t integer;
    double number;
    void *pointer;
};
template <typename T> T as(const Value &v) {
    if constexpr (std::is_pointer_v<T>)
        return static_cast<T>(v.pointer);
    else if constexpr (std::is_floating_point_v<T>)
        return v.number;
    else
        return T(v.integer);
}
int64_t code_of(const char *text) { return text ? (void)strlen(text), 0 : -1; }
int64_t code_of(int64_t code) { return code; }

template <typename F> struct Signature;
template <typename R, typename... A> struct Signature<R(A...)> {
    enum { COUNT = sizeof...(A) };
    static int64_t call(void *function, const Value *given) {
        return call(reinterpret_cast<R (*)(A...)>(function), given, std::index_sequence_for<A...>());
    }
    template <size_t... I> static int64_t call(R (*function)(A...), const Value *given, std::index_sequence<I...>) {
        (void)given;
        return code_of(function(as<A>(given[I])...));
    }
};
struct Entry {
    const char *name;
    size_t count;
    int64_t (*call)(void *function, const Value *given);
    void *function;
};
#define F(name) {#name, Signature<decltype(name)>::COUNT, Signature<decltype(name)>::call, nullptr}
Entry entries[] = {
    F(pk_abi_version), F(pk_last_error), F(pk_cpu_level), F(pk_cpu_levels), F(pk_cpu_set_level), F(pk_cpu_openmp),
    F(pk_cpu_unchanged), F(pk_lora_args_size), F(pk_cpu_lora_linear), F(pk_cpu_lora_linear_backward),
    F(pk_cpu_lora_mixture), F(pk_cpu_lora_mixture_backward),
    F(pk_cpu_grouped_linear), F(pk_cpu_grouped_linear_backward),
    F(pk_cpu_lora_linear_paths), F(pk_cpu_squared_row_norms), F(pk_cpu_dora_linear), F(pk_cpu_dora_linear_backward),
    F(pk_cpu_gated), F(pk_cpu_gated_backward), F(pk_cpu_adamw), F(pk_cpu_squared_norm), F(pk_cpu_norm),
    F(pk_cpu_softmax_slice),
    F(pk_cpu_norm_backward), F(pk_attention_args_size), F(pk_cpu_attention), F(pk_cpu_attention_backward),
    F(pk_cpu_rotary),
    F(pk_cpu_butterfly_rotate), F(pk_cpu_butterfly_rotate_backward), F(pk_cpu_butterfly_linear),
    F(pk_cpu_butterfly_linear_backward), F(pk_cpu_cayley), F(pk_cpu_cayley_backward), F(pk_cpu_householder_rotate),
    F(pk_cpu_householder_rotate_backward), F(pk_cpu_pair_rotate), F(pk_cpu_pair_rotate_backward),
    F(pk_cpu_quantize_4bit), F(pk_cpu_quantize_absmax), F(pk_cpu_dequantize_4bit),
    F(pk_cpu_dequantize_rows),
};
#undef F

const Entry &entry(const Record &record) {
    for (auto &e : entries)
        if (record.function == e.name && record.arguments.size() == e.count) return e;
    fprintf(stderr, "replay.cpp has no %s of %zu arguments\n", record.function.c_str(), record.arguments.size());
    exit(2);
}
int (*set_level)(const char *);
const char *(*level_in_use)();

// ---- the memory -----------------------------------------------------------------------------------------------------
enum Mode { HEAP, END, START };
const char *const mode_names[] = {"heap", "end", "start"};

class Operand { // exactly so many bytes of memory
public:
    uint8_t *start;

    Operand(Mode mode, size_t bytes) : start(nullptr), mapped_(0) {
        if (mode == HEAP) {
            start = static_cast<uint8_t *>(malloc(bytes));
        } else {
            size_t page = size_t(sysconf(_SC_PAGESIZE)), whole = (bytes + page - 1) / page * page;
            mapped_ = whole + page;
            base_ = static_cast<uint8_t *>(
                mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
            if (base_ != MAP_FAILED && !mprotect(mode == END ? base_ + whole : base_, page, PROT_NONE))
                start = mode == END ? base_ + whole - bytes : base_ + page;
        }
        if (!start) fprintf(stderr, "no memory for an operand of %zu bytes\n", bytes), exit(2);
    }
    Operand(Operand &&other) noexcept : start(other.start), base_(other.base_), mapped_(other.mapped_) {
        other.start = nullptr, other.mapped_ = 0;
    }
    ~Operand() {
        if (mapped_)
            munmap(base_, mapped_);
        else
            free(start);
    }

private:
    uint8_t *base_ = nullptr;
    size_t mapped_;
};

class Operands { // of one record
public:
    // cut: the block that is a byte short; shared: those that are only read come from there
    Operands(const Record &record, Mode mode, const Operands *shared = nullptr, size_t cut = SIZE_MAX)
        : record_(record) {
        for (size_t i = 0; i < record.blocks.size(); ++i) {
            auto &block = record.blocks[i];
            size_t bytes = size_t(block.bytes) - (i == cut);
            if (shared && block.use == IN && block.relocations.empty()) {
                at_.push_back(shared->at_[i]);
                continue;
            }
            own_.emplace_back(mode, bytes);
            at_.push_back(own_.back().start);
            if (block.content)
                memcpy(at_[i], block.content, bytes);
            else
                memset(at_[i], 0xff, bytes);
        }
        for (size_t i = 0; i < record.blocks.size(); ++i)
            for (auto &to : record.blocks[i].relocations) {
                uint8_t *target = at_[to.block] + to.at;
                memcpy(at_[i] + to.offset, &target, sizeof target);
            }
    }
    void *at(const Argument &a) const { return at_[a.block] + a.bits; }
    const uint8_t *block(size_t i) const { return at_[i]; }
    bool as_it_was(size_t i) const {
        auto &block = record_.blocks[i];
        std::vector<uint8_t> expected(block.content, block.content + block.bytes);
        for (auto &to : block.relocations) {
            uint8_t *target = at_[to.block] + to.at;
            memcpy(expected.data() + to.offset, &target, sizeof target);
        }
        return !memcmp(expected.data(), at_[i], expected.size());
    }

private:
    const Record &record_;
    std::vector<Operand> own_;
    std::vector<uint8_t *> at_;
};

// ---- the comparison -------------------------------------------------------------------------------------------------
// The first element that differs, else -1; NaNs are equal whatever their bits.
template <typename T> int64_t differs(const uint8_t *got, const uint8_t *want, uint64_t bytes, T infinity) {
    const T magnitude = T(~T(0)) >> 1;
    for (uint64_t i = 0; i < bytes / sizeof(T); ++i) {
        T a, b;
        memcpy(&a, got + i * sizeof a, sizeof a), memcpy(&b, want + i * sizeof b, sizeof b);
        if (a == b) continue;
        if (!infinity || T(a & magnitude) <= infinity || T(b & magnitude) <= infinity) return int64_t(i);
    }
    return -1;
}
int64_t differs(uint8_t dtype, const uint8_t *got, const uint8_t *want, uint64_t bytes) {
    switch (dtype) {
    case PK_F32: return differs<uint32_t>(got, want, bytes, 0x7f800000u);
    case PK_BF16: return differs<uint16_t>(got, want, bytes, 0x7f80);
    case PK_F16: return differs<uint16_t>(got, want, bytes, 0x7c00);
    case PK_F64: return differs<uint64_t>(got, want, bytes, 0x7ff0000000000000ull);
    default: return differs<uint8_t>(got, want, bytes, 0);
    }
}

const size_t SIZE_OF[] = {4, 2, 2, 8, 1}; // bytes of an element, by its pk_dtype

std::atomic<int> wrong{0};
struct Task {
    const Record *record;
    size_t number;
    const char *level, *mode;
};

void say(const Task &t, const std::string &what) {
    if (wrong++ < 20)
        fprintf(stderr, "record %zu, %s (%s), level %s, %s: %s\n", t.number, t.record->function.c_str(),
                t.record->label.c_str(), t.level, t.mode, what.c_str());
}

std::string hexadecimal(const uint8_t *bytes, size_t count) { // as a little-endian number
    std::string text = "0x";
    for (size_t i = count; i--;) text += "0123456789abcdef"[bytes[i] >> 4], text += "0123456789abcdef"[bytes[i] & 15];
    return text;
}

void run(const Task &t, const Operands &operands, const Result &expected) {
    team_task = &t;
    auto &record = *t.record;
    auto &called = entry(record);
    std::vector<Value> given(record.arguments.size());
    for (size_t i = 0; i < given.size(); ++i) {
        auto &a = record.arguments[i];
        given[i].integer = a.bits, memcpy(&given[i].number, &a.bits, 8);
        given[i].pointer = a.form == POINTER ? operands.at(a) : nullptr;
    }
    int64_t code = called.call(called.function, given.data());
    if (code != expected.code)
        say(t, "returns " + std::to_string(code) + ", recorded " + std::to_string(expected.code));
    for (size_t i = 0; i < record.blocks.size(); ++i) {
        auto &block = record.blocks[i];
        if (block.use == IN) {
            if (!operands.as_it_was(i)) say(t, "writes to what it reads, block " + std::to_string(i));
        } else if (!code && !expected.code) { // after an error, outputs are undefined
            int64_t at = differs(block.dtype, operands.block(i), expected.blocks[i], block.bytes);
            size_t size = SIZE_OF[block.dtype];
            if (at >= 0)
                say(t, "block " + std::to_string(i) + " of " + std::to_string(block.bytes) + " bytes, element " +
                           std::to_string(at) + ": " + hexadecimal(operands.block(i) + at * size, size) +
                           ", recorded " + hexadecimal(expected.blocks[i] + at * size, size));
        }
    }
    team_task = nullptr;
}

// ---- what was under way when the process ended ----------------------------------------------------------------------
void last_words() {
    if (auto t = static_cast<const Task *>(team_task))
        fprintf(stderr, "in record %zu, %s (%s), level %s, %s\n", t->number, t->record->function.c_str(),
                t->record->label.c_str(), t->level, t->mode);
}
void on_signal(int) {
    fputs("a memory access beyond an operand\n", stderr);
    last_words();
    _exit(99);
}

// ---- the modes ------------------------------------------------------------------------------------------------------
void one_after_another(const Corpus &corpus, const std::string &modes) {
    for (size_t level = 0; level < corpus.levels.size(); ++level)
        for (size_t i = 0; i < corpus.records.size(); ++i)
            for (int mode = HEAP; mode <= START; ++mode) {
                if (modes.find(mode_names[mode]) == std::string::npos) continue;
                const char *name = corpus.levels[level].c_str();
                if (set_level(name)) fprintf(stderr, "this library has no level %s\n", name), exit(2);
                Operands operands(corpus.records[i], Mode(mode));
                run({&corpus.records[i], i, name, mode_names[mode]}, operands, corpus.records[i].results[level]);
            }
}

void at_once(const Corpus &corpus, size_t threads) {
    std::vector<Operands> shared;
    for (auto &record : corpus.records) shared.emplace_back(record, HEAP);
    // First at the level that the library chooses in its first calls, which are made by all of them at once.
    for (size_t round = 0; round <= corpus.levels.size(); ++round) {
        if (round && set_level(corpus.levels[round - 1].c_str())) exit(2);
        std::vector<std::thread> all;
        for (size_t thread = 0; thread < threads; ++thread)
            all.emplace_back([&, thread] {
                const char *name = level_in_use();
                size_t level = 0, count = corpus.records.size();
                while (level + 1 < corpus.levels.size() && corpus.levels[level] != name) ++level;
                for (size_t step = 0; step < count; ++step) {
                    // From a third to a third of the records, so that different functions meet; then all the same ones.
                    size_t i = round % 2 ? step : (step + thread * count / threads) % count;
                    if (corpus.records[i].function == "pk_cpu_set_level") continue; // not while kernels run
                    Operands operands(corpus.records[i], HEAP, &shared[i]);
                    run({&corpus.records[i], i, name, "threads"}, operands, corpus.records[i].results[level]);
                }
            });
        for (auto &one : all) one.join();
    }
}
} // namespace

int main(int count, char **words) {
    if (count < 4) fputs("replay LIBRARY CORPUS heap,end,start | threads [COUNT] | cut,MODE RECORD BLOCK\n", stderr), exit(2);
    if (__sanitizer_set_death_callback)
        __sanitizer_set_death_callback(last_words);
    else
        signal(SIGSEGV, on_signal), signal(SIGBUS, on_signal);
    void *library = dlopen(words[1], RTLD_NOW | RTLD_LOCAL);
    if (!library) fprintf(stderr, "%s\n", dlerror()), exit(2);
    for (auto &e : entries)
        if (!(e.function = dlsym(library, e.name))) fprintf(stderr, "%s\n", dlerror()), exit(2);
    memcpy(&set_level, &entries[4].function, sizeof set_level);
    memcpy(&level_in_use, &entries[2].function, sizeof level_in_use);
    Corpus corpus(words[2]);
    std::string mode = words[3];
    if (mode == "threads") {
        at_once(corpus, count > 4 ? size_t(atoi(words[4])) : 3);
    } else if (mode.find("cut,") == 0 && count == 6) {
        size_t number = size_t(atoi(words[4])), block = size_t(atoi(words[5]));
        if (number >= corpus.records.size() || block >= corpus.records[number].blocks.size()) exit(2);
        auto &record = corpus.records[number];
        Mode in = mode == "cut,end" ? END : HEAP;
        for (size_t level = 0; level < corpus.levels.size(); ++level) {
            if (set_level(corpus.levels[level].c_str())) exit(2);
            Operands operands(record, in, nullptr, block);
            run({&record, number, corpus.levels[level].c_str(), "cut"}, operands, record.results[level]);
        }
    } else {
        one_after_another(corpus, mode);
    }
    printf("%zu records at %zu levels: %d differences\n", corpus.records.size(), corpus.levels.size(), wrong.load());
    return wrong != 0;
}
