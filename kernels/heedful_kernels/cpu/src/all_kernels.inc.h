// Every kernel of one instruction set. The including file has defined its vectors (W lanes, vf, vi,
// fma, load_half, reduce_*, store_bytes) and its two tile products; all else is shared.
//
// Everything sits in an unnamed namespace and no standard template is used, so that no function
// compiled with this file's flags can be the copy that the linker gives to another one.
#include "vec.inc.h"
#include "rows.inc.h"
#include "linear.inc.h"
#include "attention.inc.h"
#include "lora.inc.h"
#include "argmax.inc.h"

namespace hk {

const KernelTable *HK_ISA_TABLE() {
  static const KernelTable table = {
      HK_ISA_NAME,
      {embed, norm_quant, quantize, linear_q4, linear_q8, rope_kv, attention, activation,
       gather_rows, lora_shrink, lora_expand, argmax_partial, add_position, attention_combine,
       argmax_combine},
  };
  return &table;
}

}  // namespace hk
