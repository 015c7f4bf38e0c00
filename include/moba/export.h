#pragma once

/// Symbols are hidden by default; this marks the few that a user of the library may call.
#if defined(__GNUC__)
#define MOBA_EXPORT __attribute__((visibility("default")))
#else
#define MOBA_EXPORT
#endif
