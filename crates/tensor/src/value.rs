//! `Tensor`: buffer, offset, shape, dtype; row-major. Views share the buffer.

use device::{Buffer, DType, Device, OutOfMemory, View, ViewMut};
use half::bf16;

/// A dense row-major array on a device. Cloning shares the bytes.
#[derive(Clone)]
pub struct Tensor {
    buffer: Buffer,
    dtype: DType,
    /// First element inside the buffer.
    start: usize,
    shape: Vec<usize>,
}

impl Tensor {
    /// Unspecified contents: for outputs that are written whole.
    pub fn new(device: Device, dtype: DType, shape: &[usize]) -> Result<Tensor, OutOfMemory> {
        let bytes = shape.iter().product::<usize>() * dtype.size_bytes();
        Ok(Tensor { buffer: Buffer::new(device, bytes)?, dtype, start: 0, shape: shape.to_vec() })
    }

    /// All zeros.
    pub fn zeros(device: Device, dtype: DType, shape: &[usize]) -> Result<Tensor, OutOfMemory> {
        let mut tensor = Self::new(device, dtype, shape)?;
        device::fill_zero(tensor.view_mut());
        Ok(tensor)
    }

    /// Values rounded to `dtype` (f32 or bf16).
    pub fn from_f32(values: &[f32], dtype: DType, shape: &[usize]) -> Result<Tensor, OutOfMemory> {
        assert_eq!(values.len(), shape.iter().product::<usize>(), "values for shape {shape:?}");
        let mut tensor = Self::new(Device::Cpu, dtype, shape)?;
        kernels::elementwise::copy(tensor.view_mut(), View::of_f32(values));
        Ok(tensor)
    }

    /// Values widened to f32.
    pub fn to_f32(&self) -> Vec<f32> {
        if self.device() != Device::Cpu {
            let here = self.to_device(Device::Cpu).expect("room for values that are looked at");
            return here.to_f32();
        }
        match self.view().floats() {
            device::Slice::F32(values) => values.to_vec(),
            device::Slice::Bf16(values) => values.iter().copied().map(bf16::to_f32).collect(),
        }
    }

    /// The same elements on `device`; itself where it is there.
    pub fn on(self, device: Device) -> Result<Tensor, OutOfMemory> {
        if self.device() == device { Ok(self) } else { self.to_device(device) }
    }

    /// The elements at the start of a buffer that came from elsewhere.
    pub fn from_buffer(buffer: Buffer, dtype: DType, shape: &[usize]) -> Tensor {
        let bytes = shape.iter().product::<usize>() * dtype.size_bytes();
        assert!(bytes <= buffer.len_bytes(), "{shape:?} of {dtype} in {} bytes", buffer.len_bytes());
        Tensor { buffer, dtype, start: 0, shape: shape.to_vec() }
    }

    /// The buffer whose first elements these are, to hand it elsewhere; a copy where they lie further in.
    pub fn into_buffer(self) -> Result<Buffer, OutOfMemory> {
        if self.start == 0 { Ok(self.buffer) } else { self.duplicate().map(|copy| copy.buffer) }
    }

    /// Sizes of the dimensions.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether some dimension is zero.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Number of rows when seen as a matrix: the product of all dimensions but the last.
    pub fn rows(&self) -> usize {
        self.shape.iter().rev().skip(1).product()
    }

    /// The last dimension.
    pub fn cols(&self) -> usize {
        self.shape.last().copied().unwrap_or(1)
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Where it lives.
    pub fn device(&self) -> Device {
        self.buffer.device()
    }

    /// The elements, for reading.
    pub fn view(&self) -> View<'_> {
        self.buffer.view(self.dtype, self.start, self.len())
    }

    /// The elements, for writing; only on the last handle of the buffer.
    pub fn view_mut(&mut self) -> ViewMut<'_> {
        let len = self.len();
        self.buffer.view_mut(self.dtype, self.start, len)
    }

    /// Whether this handle may write.
    pub fn is_unique(&mut self) -> bool {
        self.buffer.is_unique()
    }

    /// How many handles the buffer has.
    pub(crate) fn handles(&self) -> usize {
        self.buffer.handles()
    }

    /// Whether both are the same elements of the same buffer.
    pub(crate) fn is_same(&self, other: &Tensor) -> bool {
        self.buffer.is_same(&other.buffer)
            && (self.start, self.dtype, &self.shape) == (other.start, other.dtype, &other.shape)
    }

    /// Rows `[start, start + count)` of the matrix, sharing the buffer.
    pub fn narrow_rows(&self, start: usize, count: usize) -> Tensor {
        assert!(start + count <= self.rows(), "rows {start}+{count} of {}", self.rows());
        let cols = self.cols();
        Tensor {
            buffer: self.buffer.clone(),
            dtype: self.dtype,
            start: self.start + start * cols,
            shape: vec![count, cols],
        }
    }

    /// The same bytes as elements of another type; the last dimension counts accordingly.
    pub fn as_type(&self, dtype: DType) -> Tensor {
        let (old, new) = (self.dtype.size_bytes(), dtype.size_bytes());
        let scaled = |count: usize| {
            assert!((count * old).is_multiple_of(new), "{count} elements of {} as {dtype}", self.dtype);
            count * old / new
        };
        let mut shape = self.shape.clone();
        if let Some(last) = shape.last_mut() {
            *last = scaled(*last);
        }
        Tensor { buffer: self.buffer.clone(), dtype, start: scaled(self.start), shape }
    }

    /// A private copy on the same device.
    pub fn duplicate(&self) -> Result<Tensor, OutOfMemory> {
        self.to_device(self.device())
    }

    /// A private copy on any device.
    pub fn to_device(&self, device: Device) -> Result<Tensor, OutOfMemory> {
        let mut copy = Tensor::new(device, self.dtype, &self.shape)?;
        device::copy(copy.view_mut(), self.view());
        Ok(copy)
    }
}

impl std::fmt::Debug for Tensor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}{:?}", self.dtype, self.shape)
    }
}
