/* A qemu plugin that counts the instructions that a program executes, over all its threads, and says so on stderr at the
   end. Debian's qemu loads plugins but ships neither the ready-made ones nor the header, so that what is used of the
   interface is declared here (it is documented in "QEMU TCG Plugins"). */
#include <inttypes.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

struct qemu_plugin_tb; /* a piece of straight-line code, translated once */

void qemu_plugin_register_vcpu_tb_trans_cb(uint64_t plugin, void (*translated)(uint64_t, struct qemu_plugin_tb*));
size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb* piece);
void qemu_plugin_register_vcpu_tb_exec_cb(struct qemu_plugin_tb* piece, void (*executed)(unsigned, void*), int flags,
                                          void* argument);
void qemu_plugin_register_atexit_cb(uint64_t plugin, void (*finished)(uint64_t, void*), void* argument);

__attribute__((visibility("default"))) int qemu_plugin_version = PLUGIN_API;

static uint64_t instructions;

static void executed(unsigned processor, void* count) {
  (void)processor;
  __atomic_fetch_add(&instructions, (uintptr_t)count, __ATOMIC_RELAXED);
}

static void translated(uint64_t plugin, struct qemu_plugin_tb* piece) {
  (void)plugin;
  qemu_plugin_register_vcpu_tb_exec_cb(piece, executed, 0, (void*)qemu_plugin_tb_n_insns(piece));
}

static void finished(uint64_t plugin, void* argument) {
  (void)plugin;
  (void)argument;
  fprintf(stderr, "instructions %" PRIu64 "\n", instructions);
}

__attribute__((visibility("default"))) int qemu_plugin_install(uint64_t plugin, const void* about, int count,
                                                               char** words) {
  (void)about;
  (void)count;
  (void)words;
  qemu_plugin_register_vcpu_tb_trans_cb(plugin, translated);
  qemu_plugin_register_atexit_cb(plugin, finished, NULL);
  return 0;
}
