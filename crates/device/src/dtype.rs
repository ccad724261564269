//! Element types of tensors in memory and in files.

/// Type of one element.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DType {
    /// IEEE binary32.
    F32,
    /// bfloat16: the upper half of an `F32`.
    Bf16,
    /// IEEE binary16; files only, widened on load.
    F16,
    /// Unsigned 32-bit integers: token ids, positions.
    U32,
    /// Unsigned 16-bit words: the low halves of split master weights.
    U16,
    /// Bytes: 8-bit codes of moments.
    U8,
}

impl DType {
    /// Size of one element in bytes.
    pub const fn size_bytes(self) -> usize {
        match self {
            DType::F32 | DType::U32 => 4,
            DType::Bf16 | DType::F16 | DType::U16 => 2,
            DType::U8 => 1,
        }
    }

    /// Name as users write and read it.
    pub const fn name(self) -> &'static str {
        match self {
            DType::F32 => "f32",
            DType::Bf16 => "bf16",
            DType::F16 => "f16",
            DType::U32 => "u32",
            DType::U16 => "u16",
            DType::U8 => "u8",
        }
    }
}

impl std::fmt::Display for DType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}
