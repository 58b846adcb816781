/* Names for reports: the symbol table of the library that this is linked into, which holds local symbols as well. */
#include <cxxabi.h>
#include <dlfcn.h>
#include <elf.h>
#include <link.h>
#include <stdio.h>
#include <stdlib.h>

#include <string>
#include <vector>

#include "machine.h"

namespace simt {
namespace {
struct Symbol {
    const char *first, *end;
    std::string name;
    bool variable;
};

std::vector<Symbol> read_symbols() {
    std::vector<Symbol> found;
    Dl_info here;
    if (!dladdr(reinterpret_cast<void *>(&describe), &here)) return found;
    FILE *file = fopen(here.dli_fname, "rb");
    if (!file) return found;
    std::string image;
    char part[1 << 16];
    for (size_t n; (n = fread(part, 1, sizeof part, file)) > 0;) image.append(part, n);
    fclose(file);
    const char *p = image.data();
    if (image.size() < sizeof(ElfW(Ehdr)) || memcmp(p, ELFMAG, SELFMAG)) return found;
    const ElfW(Ehdr) *head = reinterpret_cast<const ElfW(Ehdr) *>(p);
    const ElfW(Shdr) *sections = reinterpret_cast<const ElfW(Shdr) *>(p + head->e_shoff);
    for (int s = 0; s < head->e_shnum; ++s) {
        if (sections[s].sh_type != SHT_SYMTAB) continue;
        const char *names = p + sections[sections[s].sh_link].sh_offset;
        const ElfW(Sym) *symbols = reinterpret_cast<const ElfW(Sym) *>(p + sections[s].sh_offset);
        for (size_t i = 0; i < sections[s].sh_size / sizeof *symbols; ++i)
            if (symbols[i].st_size && symbols[i].st_shndx != SHN_UNDEF) {
                const char *first = static_cast<const char *>(here.dli_fbase) + symbols[i].st_value;
                found.push_back({first, first + symbols[i].st_size, names + symbols[i].st_name,
                                 ELF64_ST_TYPE(symbols[i].st_info) == STT_OBJECT});
            }
    }
    return found;
}

const std::vector<Symbol> &symbols() {
    static const std::vector<Symbol> found = read_symbols();
    return found;
}

/* kernel<float>::tile from void (anonymous namespace)::kernel<float>(float const*, long)::tile */
std::string shortened(const std::string &full) {
    std::string out;
    int angle = 0, round = 0;
    for (size_t i = 0; i < full.size(); ++i) {
        static const char anonymous[] = "(anonymous namespace)::";
        if (!full.compare(i, sizeof anonymous - 1, anonymous)) {
            i += sizeof anonymous - 2;
            continue;
        }
        const char c = full[i];
        if (!angle && c == '[') break; /* [clone .isra.0] */
        round += !angle && c == '(';
        if (!round) out += c;
        round -= !angle && c == ')';
        angle += c == '<', angle -= c == '>';
        if (!angle && !round && c == ' ') out.clear(); /* the type that it returns */
    }
    return out;
}
} // namespace

Range image() {
    static const Range found = [] {
        Range all = {nullptr, nullptr};
        dl_iterate_phdr(
            [](dl_phdr_info *info, size_t, void *p) {
                Range &range = *static_cast<Range *>(p);
                const char *first = nullptr, *end = nullptr;
                for (int i = 0; i < info->dlpi_phnum; ++i) {
                    const ElfW(Phdr) &part = info->dlpi_phdr[i];
                    if (part.p_type != PT_LOAD) continue;
                    const char *at = reinterpret_cast<const char *>(info->dlpi_addr + part.p_vaddr);
                    if (!first || at < first) first = at;
                    if (at + part.p_memsz > end) end = at + part.p_memsz;
                }
                const char *here = reinterpret_cast<const char *>(&describe);
                if (here < first || here >= end) return 0;
                range = {first, end};
                return 1;
            },
            &all);
        return all;
    }();
    return found;
}

std::vector<Range> shared_of(const void *kernel) {
    std::string prefix; /* _ZZ1fvE1x is x of _Z1fv */
    for (const Symbol &s : symbols())
        if (s.first == kernel && s.name.compare(0, 2, "_Z") == 0) prefix = "_Z" + s.name.substr(1) + "E";
    std::vector<Range> found;
    for (const Symbol &s : symbols())
        /* not a lambda of the kernel's */
        if (!prefix.empty() && s.variable && s.name.compare(0, prefix.size(), prefix) == 0)
            found.push_back({s.first, s.end});
    return found;
}

void describe(const void *address, char *text, size_t size) {
    const char *at = static_cast<const char *>(address);
    text[0] = 0;
    for (const Symbol &s : symbols()) {
        if (at < s.first || at >= s.end) continue;
        int status;
        char *demangled = abi::__cxa_demangle(s.name.c_str(), nullptr, nullptr, &status);
        const std::string name = status ? s.name : shortened(demangled);
        free(demangled);
        if (at == s.first)
            snprintf(text, size, "%s", name.c_str());
        else
            snprintf(text, size, "%s + %zu", name.c_str(), static_cast<size_t>(at - s.first));
        return;
    }
}
} // namespace simt
