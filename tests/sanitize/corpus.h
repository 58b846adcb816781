/* A file of recorded calls, as tests/tools/abi_corpus.py writes it; its layout is said there. */
#pragma once
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <string>
#include <vector>

enum Use : uint8_t { IN, OUT, INOUT };
enum Form : uint8_t { INTEGER, DOUBLE, POINTER, ABSENT };

struct Relocation {
    uint64_t offset, at; // the word at `offset` of the block that has it points to byte `at` of `block`
    uint32_t block;
};
struct Block {
    uint64_t bytes;
    Use use;
    uint8_t dtype;          // a pk_dtype, by which results are compared
    const uint8_t *content; // before the call; NULL where the call does not read it
    std::vector<Relocation> relocations;
};
struct Argument {
    Form form;
    int64_t bits; // a pointer's: the offset in its block
    uint32_t block;
};
struct Result {
    int64_t code;
    std::vector<const uint8_t *> blocks; // after the call; NULL for those that are read only
};
struct Record {
    std::string function, label;
    std::vector<Block> blocks;
    std::vector<Argument> arguments;
    std::vector<Result> results; // at each of the corpus' levels
};

class Corpus {
public:
    std::vector<std::string> levels;
    std::vector<Record> records;

    explicit Corpus(const char *path) {
        FILE *file = fopen(path, "rb");
        if (!file) fail("cannot be opened");
        fseek(file, 0, SEEK_END);
        bytes_.resize(size_t(ftell(file)));
        rewind(file);
        if (fread(bytes_.data(), 1, bytes_.size(), file) != bytes_.size()) fail("cannot be read");
        fclose(file);
        if (number<uint64_t>() != 0x31737563726f6370) fail("is no corpus of this version");
        levels.resize(number<uint32_t>());
        for (auto &level : levels) level = text();
        records.resize(number<uint64_t>());
        for (auto &record : records) read(record);
        if (at_ != bytes_.size()) fail("is longer than its records");
    }

private:
    std::vector<uint8_t> bytes_;
    size_t at_ = 0;

    [[noreturn]] static void fail(const char *what) {
        fprintf(stderr, "the corpus %s\n", what);
        exit(2);
    }
    const uint8_t *take(uint64_t n) {
        if (n > bytes_.size() - at_) fail("is cut short");
        at_ += n;
        return bytes_.data() + (at_ - n);
    }
    template <typename T> T number() {
        T n;
        memcpy(&n, take(sizeof n), sizeof n);
        return n;
    }
    std::string text() {
        auto n = number<uint32_t>();
        return std::string(reinterpret_cast<const char *>(take(n)), n);
    }
    void read(Record &r) {
        r.function = text(), r.label = text();
        r.blocks.resize(number<uint32_t>());
        for (auto &b : r.blocks) {
            b.bytes = number<uint64_t>(), b.use = Use(number<uint8_t>()), b.dtype = number<uint8_t>();
            b.relocations.resize(number<uint32_t>());
            for (auto &to : b.relocations)
                to.offset = number<uint64_t>(), to.block = number<uint32_t>(), to.at = number<uint64_t>();
            b.content = b.use == OUT ? nullptr : take(b.bytes);
        }
        r.arguments.resize(number<uint32_t>());
        for (auto &a : r.arguments)
            a.form = Form(number<uint8_t>()), a.bits = number<int64_t>(), a.block = number<uint32_t>();
        r.results.resize(levels.size());
        for (auto &result : r.results) {
            result.code = number<int64_t>();
            for (size_t i = 0; i < r.blocks.size(); ++i) {
                bool written = r.blocks[i].use != IN, again = written && number<uint8_t>();
                result.blocks.push_back(!written ? nullptr : again ? r.results[0].blocks[i] : take(r.blocks[i].bytes));
            }
        }
    }
};
