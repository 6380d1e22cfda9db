// The table of variants and the choice among them.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cpu.h"
#include "kernels.h"

namespace {

constexpr char kForceVariable[] = "QSPARSE_VARIANT";

// From the slowest to the fastest of each architecture: the last supported one is chosen. The variants of other
// architectures stay in the table, so that forcing one says "cannot run here" and not "unknown".
const qsk_variant kVariants[] = {
    {"generic", qsk::cpu_has_anything, &qsk::half_generic, &qsk::quantize_generic, &qsk::topk_generic,
     &qsk::ternary_generic, &qsk::float_generic, &qsk::layer_generic},
#if defined(__x86_64__)
    {"avx2", qsk::cpu_has_avx2, &qsk::half_f16c, &qsk::quantize_avx2, &qsk::topk_avx2, &qsk::ternary_avx2,
     &qsk::float_avx2, &qsk::layer_avx2},
    {"avxvnni", qsk::cpu_has_avxvnni, &qsk::half_f16c, &qsk::quantize_avx2, &qsk::topk_avx2, &qsk::ternary_avxvnni,
     &qsk::float_avx2, &qsk::layer_avx2},
    {"avx512vnni", qsk::cpu_has_avx512vnni, &qsk::half_f16c, &qsk::quantize_avx2, &qsk::topk_avx2,
     &qsk::ternary_avx512vnni, &qsk::float_avx2, &qsk::layer_avx2},
#else
    {"avx2", nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr},
    {"avxvnni", nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr},
    {"avx512vnni", nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr},
#endif
#if defined(__aarch64__)
    {"neon", qsk::cpu_has_neon, &qsk::half_neon, &qsk::quantize_neon, &qsk::topk_neon, &qsk::ternary_neon,
     &qsk::float_neon, &qsk::layer_neon},
    {"neondot", qsk::cpu_has_neondot, &qsk::half_neon, &qsk::quantize_neon, &qsk::topk_neon, &qsk::ternary_neondot,
     &qsk::float_neon, &qsk::layer_neon},
    {"neoni8mm", qsk::cpu_has_neoni8mm, &qsk::half_neon, &qsk::quantize_neon, &qsk::topk_neon, &qsk::ternary_neoni8mm,
     &qsk::float_neon, &qsk::layer_neon},
#else
    {"neon", nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr},
    {"neondot", nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr},
    {"neoni8mm", nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr},
#endif
};

constexpr int64_t kVariantCount = sizeof kVariants / sizeof kVariants[0];

const qsk_variant* fastest_supported() {
  const qsk_variant* best = &kVariants[0];
  for (const qsk_variant& variant : kVariants) {
    if (qsk_variant_is_supported(&variant)) best = &variant;
  }
  return best;
}

}  // namespace

int64_t qsk_variant_count() { return kVariantCount; }

const qsk_variant* qsk_variant_at(int64_t position) {
  return position >= 0 && position < kVariantCount ? &kVariants[position] : nullptr;
}

const qsk_variant* qsk_variant_by_name(const char* name) {
  if (name == nullptr) return nullptr;
  for (const qsk_variant& variant : kVariants) {
    if (strcmp(variant.name, name) == 0) return &variant;
  }
  return nullptr;
}

const char* qsk_variant_name(const qsk_variant* variant) { return variant ? variant->name : nullptr; }

int64_t qsk_variant_position(const qsk_variant* variant) { return variant ? variant - kVariants : -1; }

int qsk_variant_is_supported(const qsk_variant* variant) {
  return variant != nullptr && variant->is_supported != nullptr && variant->is_supported();
}

int qsk_variant_choose(const qsk_variant** chosen) {
  if (chosen == nullptr) return QSK_NULL_ARGUMENT;
  const char* forced = getenv(kForceVariable);
  if (forced == nullptr || forced[0] == '\0') {
    *chosen = fastest_supported();
    return QSK_OK;
  }
  const qsk_variant* variant = qsk_variant_by_name(forced);
  if (variant == nullptr) return QSK_UNKNOWN_VARIANT;
  if (!qsk_variant_is_supported(variant)) return QSK_UNSUPPORTED_VARIANT;
  *chosen = variant;
  return QSK_OK;
}

int64_t qsk_variant_explain(int status, char* message, int64_t capacity) {
  char text[512];
  const char* forced = getenv(kForceVariable);
  const char* trouble = status == QSK_UNKNOWN_VARIANT ? "names no kernel variant" : "cannot run on this machine";
  int length;
  if (status == QSK_UNKNOWN_VARIANT || status == QSK_UNSUPPORTED_VARIANT) {
    length = snprintf(text, sizeof text, "%s=%.64s %s; supported here:", kForceVariable, forced ? forced : "", trouble);
    for (const qsk_variant& variant : kVariants) {
      if (qsk_variant_is_supported(&variant)) {
        length += snprintf(text + length, sizeof text - length, " %s", variant.name);
      }
    }
    length += snprintf(text + length, sizeof text - length, ". Set one of them, or unset %s.", kForceVariable);
  } else {
    length = snprintf(text, sizeof text, "%s", qsk_status_message(status));
  }
  if (message != nullptr && capacity > 0) snprintf(message, capacity, "%s", text);
  return length + 1;
}

const char* qsk_status_message(int status) {
  switch (status) {
    case QSK_OK:
      return "no error";
    case QSK_NULL_ARGUMENT:
      return "a required pointer is NULL";
    case QSK_BAD_SIZE:
      return "a size is negative, or too large for 32-bit sums";
    case QSK_BAD_TYPE:
      return "an argument does not take that element type";
    case QSK_BAD_K:
      return "k is outside 0..width of a row or block";
    case QSK_SCRATCH_TOO_SMALL:
      return "the scratch memory is too small";
    case QSK_BAD_INDEX:
      return "an id is outside the rows of the matrix";
    case QSK_UNKNOWN_VARIANT:
      return "no kernel variant has that name";
    case QSK_UNSUPPORTED_VARIANT:
      return "this machine cannot run that kernel variant";
    default:
      return "unknown status";
  }
}

const char* qsk_version() { return QSK_VERSION; }

int qsk::resolve_variant(const qsk_variant** variant) {
  if (*variant == nullptr) return qsk_variant_choose(variant);
  return qsk_variant_is_supported(*variant) ? QSK_OK : QSK_UNSUPPORTED_VARIANT;
}
