// Values of either type as float32, and back.

namespace headrace {
namespace HEADRACE_TARGET {
namespace {

inline float ToFloat32(float value) { return value; }
inline float ToFloat32(uint16_t value) { return FromBfloat16(value); }

inline F32x16 LoadAsFloat32(const float* from) { return Load(from); }
inline F32x16 LoadAsFloat32(const uint16_t* from) { return LoadBfloat16(from); }

inline void StoreAs(float* to, const F32x16& a) { Store(to, a); }
inline void StoreAs(uint16_t* to, const F32x16& a) { StoreBfloat16(to, a); }

}  // namespace
}  // namespace HEADRACE_TARGET
}  // namespace headrace
