//! Typed windows into buffers: what kernels take instead of tensors.
//!
//! A view carries its device and its element type as values, so an op has one signature and one
//! `match` on the device. On the CPU it opens into a slice of the element type.

use crate::{DType, Device};
use half::bf16;
use std::marker::PhantomData;

/// Read-only window: `len` elements of `dtype` on `device`.
#[derive(Clone, Copy)]
pub struct View<'a> {
    device: Device,
    dtype: DType,
    ptr: *const u8,
    len: usize,
    life: PhantomData<&'a [u8]>,
}

/// Writable window: `len` elements of `dtype` on `device`, exclusively ours for `'a`.
pub struct ViewMut<'a> {
    device: Device,
    dtype: DType,
    ptr: *mut u8,
    len: usize,
    life: PhantomData<&'a mut [u8]>,
}

// SAFETY: a view is a borrowed slice with its length and type beside it; it may cross threads as
// `&[T]` and `&mut [T]` may.
unsafe impl Send for View<'_> {}
// SAFETY: as above; a shared View only hands out shared slices.
unsafe impl Sync for View<'_> {}
// SAFETY: as above for the exclusive kind.
unsafe impl Send for ViewMut<'_> {}

/// A CPU view opened by its floating-point type.
#[derive(Clone, Copy)]
pub enum Slice<'a> {
    /// 32-bit floats.
    F32(&'a [f32]),
    /// bfloat16.
    Bf16(&'a [bf16]),
}

/// A writable CPU view opened by its floating-point type.
pub enum SliceMut<'a> {
    /// 32-bit floats.
    F32(&'a mut [f32]),
    /// bfloat16.
    Bf16(&'a mut [bf16]),
}

fn elements_in(dtype: DType, bytes: usize) -> usize {
    assert!(bytes.is_multiple_of(dtype.size_bytes()), "{bytes} bytes of {dtype}");
    bytes / dtype.size_bytes()
}

impl<'a> View<'a> {
    /// Window on bytes of a buffer; `ptr` must stay valid and aligned for `dtype` during `'a`.
    ///
    /// # Safety
    /// `ptr` points to at least `len` initialised elements of `dtype`, not written during `'a`.
    pub(crate) unsafe fn new(device: Device, dtype: DType, ptr: *const u8, len: usize) -> Self {
        debug_assert!((ptr as usize).is_multiple_of(dtype.size_bytes()));
        Self { device, dtype, ptr, len, life: PhantomData }
    }

    /// Window on a slice of floats in CPU memory.
    pub fn of_f32(data: &'a [f32]) -> Self {
        // SAFETY: the slice is valid for 'a and shared.
        unsafe { Self::new(Device::Cpu, DType::F32, data.as_ptr().cast(), data.len()) }
    }

    /// Window on a slice of bfloat16 in CPU memory.
    pub fn of_bf16(data: &'a [bf16]) -> Self {
        // SAFETY: the slice is valid for 'a and shared.
        unsafe { Self::new(Device::Cpu, DType::Bf16, data.as_ptr().cast(), data.len()) }
    }

    /// Window on a slice of integers in CPU memory.
    pub fn of_u32(data: &'a [u32]) -> Self {
        // SAFETY: the slice is valid for 'a and shared.
        unsafe { Self::new(Device::Cpu, DType::U32, data.as_ptr().cast(), data.len()) }
    }

    /// Window on a slice of 16-bit words in CPU memory.
    pub fn of_u16(data: &'a [u16]) -> Self {
        // SAFETY: the slice is valid for 'a and shared.
        unsafe { Self::new(Device::Cpu, DType::U16, data.as_ptr().cast(), data.len()) }
    }

    /// Window on bytes in CPU memory as elements of any type, for copies: bytes have no alignment.
    pub fn of_bytes(dtype: DType, data: &'a [u8]) -> Self {
        let len = elements_in(dtype, data.len());
        View { device: Device::Cpu, dtype, ptr: data.as_ptr(), len, life: PhantomData }
    }

    /// Device of the window.
    pub fn device(&self) -> Device {
        self.device
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether the window holds nothing.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Elements `[start, start + len)`.
    pub fn narrow(&self, start: usize, len: usize) -> View<'a> {
        assert!(start + len <= self.len, "view of {} elements narrowed to {start}+{len}", self.len);
        // SAFETY: inside the window, checked above.
        unsafe { View::new(self.device, self.dtype, self.ptr.add(start * self.dtype.size_bytes()), len) }
    }

    /// Where the first element lies in the memory of the device.
    pub fn address(&self) -> u64 {
        self.ptr as u64
    }

    fn open<T>(&self, dtype: DType) -> &'a [T] {
        assert_eq!(self.dtype, dtype, "view of {} opened as {dtype}", self.dtype);
        assert!((self.ptr as usize).is_multiple_of(dtype.size_bytes()), "bytes are copied, not opened");
        self.device.assert_opens();
        // SAFETY: `new` promised `len` initialised elements of `dtype` for 'a; the type matches it.
        unsafe { std::slice::from_raw_parts(self.ptr.cast(), self.len) }
    }

    /// The floats; a wrong type is our bug and panics.
    pub fn f32(&self) -> &'a [f32] {
        self.open(DType::F32)
    }

    /// The bfloat16 values.
    pub fn bf16(&self) -> &'a [bf16] {
        self.open(DType::Bf16)
    }

    /// The 32-bit integers.
    pub fn u32(&self) -> &'a [u32] {
        self.open(DType::U32)
    }

    /// The 16-bit words.
    pub fn u16(&self) -> &'a [u16] {
        self.open(DType::U16)
    }

    /// Open by floating-point type.
    pub fn floats(&self) -> Slice<'a> {
        match self.dtype {
            DType::F32 => Slice::F32(self.f32()),
            DType::Bf16 => Slice::Bf16(self.bf16()),
            other => panic!("no float kernel reads {other}"),
        }
    }

    /// The raw bytes, for files and checksums.
    pub fn bytes(&self) -> &'a [u8] {
        self.device.assert_opens();
        // SAFETY: plain old data, valid for 'a.
        unsafe { std::slice::from_raw_parts(self.ptr, self.len * self.dtype.size_bytes()) }
    }
}

impl<'a> ViewMut<'a> {
    /// Writable window on bytes of a buffer.
    ///
    /// # Safety
    /// As `View::new`, and nobody else reads or writes the elements during `'a`.
    pub(crate) unsafe fn new(device: Device, dtype: DType, ptr: *mut u8, len: usize) -> Self {
        debug_assert!((ptr as usize).is_multiple_of(dtype.size_bytes()));
        Self { device, dtype, ptr, len, life: PhantomData }
    }

    /// Writable window on bytes in CPU memory as elements of any type, for copies: bytes have no alignment.
    pub fn of_bytes(dtype: DType, data: &'a mut [u8]) -> Self {
        let len = elements_in(dtype, data.len());
        ViewMut { device: Device::Cpu, dtype, ptr: data.as_mut_ptr(), len, life: PhantomData }
    }

    /// Writable window on floats in CPU memory.
    pub fn of_f32(data: &'a mut [f32]) -> Self {
        // SAFETY: the slice is valid for 'a and exclusive.
        unsafe { Self::new(Device::Cpu, DType::F32, data.as_mut_ptr().cast(), data.len()) }
    }

    /// Writable window on bfloat16 in CPU memory.
    pub fn of_bf16(data: &'a mut [bf16]) -> Self {
        // SAFETY: the slice is valid for 'a and exclusive.
        unsafe { Self::new(Device::Cpu, DType::Bf16, data.as_mut_ptr().cast(), data.len()) }
    }

    /// Writable window on 16-bit words in CPU memory.
    pub fn of_u16(data: &'a mut [u16]) -> Self {
        // SAFETY: the slice is valid for 'a and exclusive.
        unsafe { Self::new(Device::Cpu, DType::U16, data.as_mut_ptr().cast(), data.len()) }
    }

    /// Device of the window.
    pub fn device(&self) -> Device {
        self.device
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether the window holds nothing.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The same window for a shorter time.
    pub fn reborrow(&mut self) -> ViewMut<'_> {
        // SAFETY: `self` stays mutably borrowed while the shorter window lives.
        unsafe { ViewMut::new(self.device, self.dtype, self.ptr, self.len) }
    }

    /// Read what is there.
    pub fn as_view(&self) -> View<'_> {
        // SAFETY: `self` stays borrowed while the shared window lives.
        unsafe { View::new(self.device, self.dtype, self.ptr, self.len) }
    }

    /// Elements `[start, start + len)`.
    pub fn narrow(self, start: usize, len: usize) -> ViewMut<'a> {
        assert!(start + len <= self.len, "view of {} elements narrowed to {start}+{len}", self.len);
        // SAFETY: inside the window, checked above; `self` is consumed.
        unsafe { ViewMut::new(self.device, self.dtype, self.ptr.add(start * self.dtype.size_bytes()), len) }
    }

    /// Elements `[0, at)` and the rest, as two windows.
    pub fn split_at(self, at: usize) -> (ViewMut<'a>, ViewMut<'a>) {
        assert!(at <= self.len, "view of {} elements split at {at}", self.len);
        // SAFETY: two parts of the window that do not overlap; `self` is consumed.
        unsafe {
            let rest = self.ptr.add(at * self.dtype.size_bytes());
            (
                ViewMut::new(self.device, self.dtype, self.ptr, at),
                ViewMut::new(self.device, self.dtype, rest, self.len - at),
            )
        }
    }

    /// Where the first element lies in the memory of the device.
    pub fn address(&self) -> u64 {
        self.ptr as u64
    }

    fn open<T>(self, dtype: DType) -> &'a mut [T] {
        assert_eq!(self.dtype, dtype, "view of {} opened as {dtype}", self.dtype);
        assert!((self.ptr as usize).is_multiple_of(dtype.size_bytes()), "bytes are copied, not opened");
        self.device.assert_opens();
        // SAFETY: `new` promised `len` exclusive initialised elements of `dtype` for 'a.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.cast(), self.len) }
    }

    /// The floats; a wrong type is our bug and panics.
    pub fn f32(self) -> &'a mut [f32] {
        self.open(DType::F32)
    }

    /// The bfloat16 values.
    pub fn bf16(self) -> &'a mut [bf16] {
        self.open(DType::Bf16)
    }

    /// The 32-bit integers.
    pub fn u32(self) -> &'a mut [u32] {
        self.open(DType::U32)
    }

    /// The 16-bit words.
    pub fn u16(self) -> &'a mut [u16] {
        self.open(DType::U16)
    }

    /// Open by floating-point type.
    pub fn floats(self) -> SliceMut<'a> {
        match self.dtype {
            DType::F32 => SliceMut::F32(self.f32()),
            DType::Bf16 => SliceMut::Bf16(self.bf16()),
            other => panic!("no float kernel writes {other}"),
        }
    }

    /// The raw bytes, for files.
    pub fn bytes(self) -> &'a mut [u8] {
        self.device.assert_opens();
        // SAFETY: plain old data, exclusive for 'a; every bit pattern is a valid element.
        unsafe { std::slice::from_raw_parts_mut(self.ptr, self.len * self.dtype.size_bytes()) }
    }
}
