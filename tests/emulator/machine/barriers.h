// Mbarriers, for whoever arrives on them.

#ifndef JAX_MOE_EMULATOR_BARRIERS_H_
#define JAX_MOE_EMULATOR_BARRIERS_H_

#include "step.h"

namespace emulator {

// Throws if there is none.
Mbarrier& MbarrierAt(Cta& cta, uint64_t address);
// The use of an mbarrier as an access: it must not race with its initialisation.
void TouchMbarrier(Step& step, Cta& cta, uint64_t address);
// `warp`: who arrives. Every phase of an mbarrier must have the arrivals of its first, warp by warp.
void ArriveOn(Mbarrier* barrier, const Warp& warp, int64_t count);
void CompleteBytes(Mbarrier* barrier, int64_t bytes);
void Advance(Mbarrier* barrier);
// What the lanes of a step hand on: where they are not the whole warp, of what it did together only what came before
// its lanes last waited for each other.
View Released(const Step& step);
// After a release: what the warp does from now on is no part of it.
void NextEpoch(Warp* warp);
// The lanes of the warp have waited for each other.
void Synchronised(Warp* warp);

}  // namespace emulator

#endif  // JAX_MOE_EMULATOR_BARRIERS_H_
