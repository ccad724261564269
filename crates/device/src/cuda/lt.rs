//! Products through cuBLASLt. It reads matrices by columns: what we store by rows is the transpose to it, so
//! that c = a b becomes c^T = b^T a^T, and nothing moves.

use super::driver::{Address, Matmul, Matrix};
use super::lock;
use crate::DType;
use cudarc::cublaslt::result::{self, CublasError};
use cudarc::cublaslt::sys;
use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::Mutex;

/// cuBLASLt and what it has been asked so far.
pub(super) struct Lt {
    handle: sys::cublasLtHandle_t,
    plans: Mutex<HashMap<Kind, Plan>>,
}

// SAFETY: the handle may be used from any thread, and plans are used by who holds the lock alone.
unsafe impl Send for Lt {}
// SAFETY: as above.
unsafe impl Sync for Lt {}

/// Plans kept: one per shape of the model, but experts see another number of tokens in every step.
const MOST_PLANS: usize = 4096;

/// No kernel loads or stores more than so many bytes at once. Better alignment is not mentioned: the bits of a
/// product shall not depend on where its matrices lie.
const ALIGN_BYTES: u64 = 16;

/// The oldest version whose numbers mean what ours do.
const OLDEST: usize = 12_00_00;

/// A product but for its addresses, of which the alignment is left.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Kind {
    m: usize,
    n: usize,
    k: usize,
    a: Matrix,
    b: Matrix,
    c: Matrix,
    bias: bool,
    added: Option<Matrix>,
    workspace_bytes: usize,
}

fn alignment(at: Address) -> u64 {
    1 << (at | ALIGN_BYTES).trailing_zeros()
}

impl Kind {
    fn of(product: &Matmul, workspace_bytes: usize) -> Kind {
        let Matmul { m, n, k, a, b, c, bias, added } = *product;
        let aligned = |matrix: Matrix| Matrix { at: alignment(matrix.at), ..matrix };
        Kind {
            m,
            n,
            k,
            a: aligned(a),
            b: aligned(b),
            c: aligned(c),
            bias: bias.is_some(),
            added: added.map(aligned),
            workspace_bytes,
        }
    }

    /// What a panic has to say about it.
    fn describe(&self) -> String {
        let matrix = |name, rows, cols, x: &Matrix| {
            let t = if x.transposed { " transposed" } else { "" };
            format!("{name} [{rows}, {cols}] {}{t} (ld {}, aligned to {} bytes)", x.dtype, x.ld, x.at)
        };
        let mut text = format!(
            "{} = {} {}",
            matrix("c", self.m, self.n, &self.c),
            matrix("a", self.m, self.k, &self.a),
            matrix("b", self.k, self.n, &self.b)
        );
        if self.bias {
            text += " + bias";
        }
        if let Some(added) = &self.added {
            text += &matrix(" + added", self.m, self.n, added);
        }
        text
    }
}

/// A matrix as it is stored, read by columns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct ByColumns {
    rows: usize,
    cols: usize,
    ld: usize,
}

/// What is stored of a logical [rows, cols]. A factor of the transposed product is its transpose exactly
/// where ours is.
fn by_columns(matrix: &Matrix, rows: usize, cols: usize) -> ByColumns {
    let (rows, cols) = if matrix.transposed { (rows, cols) } else { (cols, rows) };
    ByColumns { rows, cols, ld: matrix.ld }
}

struct Layout(sys::cublasLtMatrixLayout_t);

impl Layout {
    fn new(dtype: DType, x: ByColumns) -> Result<Layout, CublasError> {
        let (rows, cols) = (x.rows as u64, x.cols as u64);
        result::create_matrix_layout(type_of(dtype), rows, cols, x.ld as i64).map(Layout)
    }
}

impl Drop for Layout {
    fn drop(&mut self) {
        // SAFETY: made by `new`, destroyed once. There is nothing to do about a refusal.
        let _ = unsafe { result::destroy_matrix_layout(self.0) };
    }
}

struct Description(sys::cublasLtMatmulDesc_t);

impl Description {
    fn set<T>(&self, which: sys::cublasLtMatmulDescAttributes_t, value: T) -> Result<(), CublasError> {
        let at: *const T = &value;
        // SAFETY: the description lives, and as many bytes are copied from `value`.
        unsafe { result::set_matmul_desc_attribute(self.0, which, at.cast(), size_of::<T>()) }
    }
}

impl Drop for Description {
    fn drop(&mut self) {
        // SAFETY: as for `Layout`.
        let _ = unsafe { result::destroy_matmul_desc(self.0) };
    }
}

struct Preference(sys::cublasLtMatmulPreference_t);

impl Preference {
    fn set<T>(&self, which: sys::cublasLtMatmulPreferenceAttributes_t, value: T) -> Result<(), CublasError> {
        let at: *const T = &value;
        // SAFETY: the preference lives, and as many bytes are copied from `value`.
        unsafe { result::set_matmul_pref_attribute(self.0, which, at.cast(), size_of::<T>()) }
    }
}

impl Drop for Preference {
    fn drop(&mut self) {
        // SAFETY: as for `Layout`.
        let _ = unsafe { result::destroy_matmul_pref(self.0) };
    }
}

/// How a kind of product is computed. To the library its left factor is our `b`.
struct Plan {
    description: Description,
    left: Layout,
    right: Layout,
    added: Layout,
    sum: Layout,
    algorithm: sys::cublasLtMatmulAlgo_t,
}

impl Plan {
    fn new(handle: sys::cublasLtHandle_t, kind: &Kind, bias: Option<Address>) -> Result<Plan, CublasError> {
        let description = description(kind, bias)?;
        let [left, right, added, sum] = layouts(kind)?;
        let preference = preference(kind)?;
        // SAFETY: all of them live.
        let best = unsafe {
            let (left, right, added, sum) = (left.0, right.0, added.0, sum.0);
            result::get_matmul_algo_heuristic(handle, description.0, left, right, added, sum, preference.0)?
        };
        Ok(Plan { description, left, right, added, sum, algorithm: best.algo })
    }
}

fn description(kind: &Kind, bias: Option<Address>) -> Result<Description, CublasError> {
    use sys::cublasLtMatmulDescAttributes_t as Of;
    // Exact f32: TF32 would be a compute type of its own.
    let compute = sys::cublasComputeType_t::CUBLAS_COMPUTE_32F;
    let description = Description(result::create_matmul_desc(compute, type_of(DType::F32))?);
    // Of cublasOperation_t: 0 as it is, 1 its transpose.
    description.set(Of::CUBLASLT_MATMUL_DESC_TRANSA, kind.b.transposed as i32)?;
    description.set(Of::CUBLASLT_MATMUL_DESC_TRANSB, kind.a.transposed as i32)?;
    if let Some(bias) = bias {
        let epilogue = sys::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_BIAS;
        description.set(Of::CUBLASLT_MATMUL_DESC_EPILOGUE, epilogue)?;
        description.set(Of::CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, type_of(kind.c.dtype))?;
        description.set(Of::CUBLASLT_MATMUL_DESC_BIAS_POINTER, bias)?;
    }
    Ok(description)
}

/// Left, right, added, sum.
fn layouts(kind: &Kind) -> Result<[Layout; 4], CublasError> {
    let Kind { m, n, k, a, b, c, .. } = *kind;
    let added = kind.added.unwrap_or(c);
    let layout = |x: Matrix, rows, cols| Layout::new(x.dtype, by_columns(&x, rows, cols));
    Ok([layout(b, k, n)?, layout(a, m, k)?, layout(added, m, n)?, layout(c, m, n)?])
}

fn preference(kind: &Kind) -> Result<Preference, CublasError> {
    use sys::cublasLtMatmulPreferenceAttributes_t as Of;
    let preference = Preference(result::create_matmul_pref()?);
    preference.set(Of::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, kind.workspace_bytes as u64)?;
    // Where k is shared among blocks, their parts are added in f32 and rounded once.
    let reduction = sys::cublasLtReductionScheme_t::CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE;
    preference.set(Of::CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, reduction)?;
    let added = kind.added.unwrap_or(kind.c);
    for (which, matrix) in [
        (Of::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, kind.b),
        (Of::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, kind.a),
        (Of::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, added),
        (Of::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, kind.c),
    ] {
        preference.set(which, matrix.at as u32)?;
    }
    Ok(preference)
}

fn type_of(dtype: DType) -> sys::cudaDataType {
    match dtype {
        DType::F32 => sys::cudaDataType::CUDA_R_32F,
        DType::Bf16 => sys::cudaDataType::CUDA_R_16BF,
        other => panic!("no product of {other}"),
    }
}

impl Lt {
    /// Whether this machine has the library. The error says what is missing.
    pub(super) fn find() -> Result<(), String> {
        // SAFETY: looks for a library and does nothing else.
        if !unsafe { sys::is_culib_present() } {
            return Err("cuBLASLt, which computes products, was not found (libcublasLt.so)".into());
        }
        // SAFETY: reads a number.
        let version = unsafe { sys::cublasLtGetVersion() };
        if version < OLDEST {
            return Err(format!("the first cuBLASLt found is version {version}, older than {OLDEST}"));
        }
        Ok(())
    }

    /// The library, which was found, for the context of this thread.
    pub(super) fn new() -> Result<Lt, String> {
        let handle = result::create_handle().map_err(|why| format!("cuBLASLt does not start: {why}"))?;
        Ok(Lt { handle, plans: Mutex::default() })
    }

    /// Launch a product. The bias begins at a multiple of 16 bytes; of f32 factors the sum is f32, too.
    ///
    /// # Safety
    /// The matrices and the workspace (address, bytes) lie in memory of the GPU whose context this thread has,
    /// and are there until `stream` is done; nothing else uses the workspace until then.
    pub(super) unsafe fn matmul(
        &self,
        product: &Matmul,
        (workspace, workspace_bytes): (Address, usize),
        stream: sys::cudaStream_t,
    ) {
        let kind = Kind::of(product, workspace_bytes);
        let bias = product.bias;
        // The library reads the bias 16 bytes at a time and cannot be told that it must not.
        assert!(bias.is_none_or(|at| alignment(at) == ALIGN_BYTES), "a bias at {bias:x?}");
        let refuse = |why: CublasError| -> ! { panic!("cuBLASLt refuses {}: {why}", kind.describe()) };
        let mut plans = lock(&self.plans);
        if plans.len() >= MOST_PLANS && !plans.contains_key(&kind) {
            plans.clear();
        }
        let plan = plans
            .entry(kind)
            .or_insert_with(|| Plan::new(self.handle, &kind, bias).unwrap_or_else(|why| refuse(why)));
        if let Some(bias) = bias {
            let which = sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_BIAS_POINTER;
            plan.description.set(which, bias).unwrap_or_else(|why| refuse(why));
        }
        let one = 1f32;
        let (added, beta) = match &product.added {
            Some(added) => (added.at, 1f32),
            None => (product.c.at, 0f32),
        };
        let scale = |x: &f32| -> *const c_void { std::ptr::from_ref(x).cast() };
        // SAFETY: the plan is of this kind of product; the rest is the caller's promise.
        let launched = unsafe {
            result::matmul(
                self.handle,
                plan.description.0,
                scale(&one),
                scale(&beta),
                product.b.at as *const c_void,
                plan.left.0,
                product.a.at as *const c_void,
                plan.right.0,
                added as *const c_void,
                plan.added.0,
                product.c.at as *mut c_void,
                plan.sum.0,
                &plan.algorithm,
                workspace as *mut c_void,
                workspace_bytes,
                stream,
            )
        };
        launched.unwrap_or_else(|why| refuse(why));
    }
}

impl Drop for Lt {
    fn drop(&mut self) {
        // SAFETY: made by `new`, destroyed once. There is nothing to do about a refusal.
        let _ = unsafe { result::destroy_handle(self.handle) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Element (i, j) of a factor, as cuBLASLt finds it.
    fn factor(data: &[f64], x: ByColumns, transposed: bool, (i, j): (usize, usize)) -> f64 {
        let (i, j) = if transposed { (j, i) } else { (i, j) };
        assert!(i < x.rows && j < x.cols && x.rows <= x.ld, "({i}, {j}) of {x:?}");
        data[j * x.ld + i]
    }

    #[test]
    fn products_by_columns_are_the_products_by_rows() {
        let (m, n, k) = (3, 5, 4);
        let matrix = |ld, transposed| Matrix { at: 0, dtype: DType::F32, ld, transposed };
        let data = |seed: usize| (0..64).map(|i| (i * seed % 23) as f64 - 11.0).collect::<Vec<_>>();
        let (a_data, b_data) = (data(7), data(5));
        for [a_transposed, b_transposed] in [[false, false], [false, true], [true, false], [true, true]] {
            let a = matrix(if a_transposed { m } else { k } + 2, a_transposed);
            let b = matrix(if b_transposed { k } else { n } + 1, b_transposed);
            let c = matrix(n + 3, false);
            // What cuBLASLt is told: D [n, m] = left [n, k] right [k, m].
            let (left, right, sum) = (by_columns(&b, k, n), by_columns(&a, m, k), by_columns(&c, m, n));
            assert_eq!(sum, ByColumns { rows: n, cols: m, ld: n + 3 });
            let mut got = vec![0.0; m * c.ld];
            for (i, j) in (0..n).flat_map(|i| (0..m).map(move |j| (i, j))) {
                let left = |p| factor(&b_data, left, b.transposed, (i, p));
                let right = |p| factor(&a_data, right, a.transposed, (p, j));
                got[j * sum.ld + i] = (0..k).map(|p| left(p) * right(p)).sum();
            }
            let at = |data: &[f64], x: &Matrix, i: usize, j: usize| {
                data[if x.transposed { j * x.ld + i } else { i * x.ld + j }]
            };
            for (i, j) in (0..m).flat_map(|i| (0..n).map(move |j| (i, j))) {
                let want: f64 = (0..k).map(|p| at(&a_data, &a, i, p) * at(&b_data, &b, p, j)).sum();
                assert_eq!(got[i * c.ld + j], want, "({i}, {j}) of {a:?} {b:?}");
            }
        }
    }

    fn kind(at: Address) -> Kind {
        let x = Matrix { at, dtype: DType::Bf16, ld: 8, transposed: false };
        let product = Matmul { m: 8, n: 8, k: 8, a: x, b: x, c: x, bias: Some(16), added: Some(x) };
        Kind::of(&product, 1 << 20)
    }

    #[test]
    fn kinds_differ_by_alignment_up_to_16_bytes() {
        assert_eq!([2, 4, 24, 16, 48, 256, 0].map(alignment), [2, 4, 8, 16, 16, 16, 16]);
        assert!(kind(4096) == kind(4112) && kind(4096) != kind(4104));
        assert!(kind(4104).describe().contains("c [8, 8] bf16 (ld 8, aligned to 8 bytes)"));
    }

    #[test]
    fn the_library_takes_what_it_is_told() {
        // SAFETY: looks for a library and does nothing else.
        if !unsafe { sys::is_culib_present() } {
            assert!(Lt::find().is_err_and(|what| what.contains("libcublasLt.so")));
            println!("not tested here: there is no cuBLASLt");
            return;
        }
        let kind = kind(4096);
        assert!(
            description(&kind, Some(4096)).is_ok() && layouts(&kind).is_ok() && preference(&kind).is_ok()
        );
        // Without a GPU it says so.
        assert!(Lt::new().err().is_none_or(|what| what.contains("cuBLASLt does not start")));
    }
}
