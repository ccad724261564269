//! A real GPU, through the driver, NVRTC and cuBLASLt of this machine, looked up when first asked for.

use super::driver::{Address, Card, Driver, Frame, Kernel, Mark, Matmul, Program, Stream};
use super::lt::Lt;
use super::{NoGpu, lock, nvrtc};
use cudarc::driver::sys::{self as cu, CUresult};
use std::cell::Cell;
use std::collections::HashMap;
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::num::NonZeroU64;
use std::path::Path;
use std::ptr::{null, null_mut};
use std::sync::Mutex;

/// Memory cuBLASLt may use for sums of parts.
const PRODUCT_BYTES: usize = 64 << 20;

/// One of the GPUs the driver shows.
pub(super) struct Real {
    context: cu::CUcontext,
    /// Compute, up, down.
    streams: [cu::CUstream; 3],
    /// Those between GPUs, by number.
    peers: Mutex<HashMap<u16, Peer>>,
    card: Card,
    device: cu::CUdevice,
    loaded: Mutex<Loaded>,
    lt: Lt,
    workspace: Address,
    /// Events that nobody uses now.
    events: Mutex<Vec<Mark>>,
}

/// A stream between GPUs.
struct Peer(cu::CUstream);

// SAFETY: handles of the driver, see below.
unsafe impl Send for Peer {}

#[derive(Default)]
struct Loaded {
    modules: Vec<cu::CUmodule>,
    functions: HashMap<String, Function>,
}

#[derive(Clone, Copy)]
struct Function(cu::CUfunction, u32);

// SAFETY: the driver's handles may be used from any thread to which the context is bound (`bind`).
unsafe impl Send for Real {}
// SAFETY: as above; the driver's calls are thread-safe, and what we change is behind mutexes.
unsafe impl Sync for Real {}
// SAFETY: handles of the driver, see above.
unsafe impl Send for Loaded {}

thread_local! {
    static BOUND: Cell<bool> = const { Cell::new(false) };
}

/// Stops on what only a broken card or program brings about.
fn check(result: CUresult, call: &str) {
    if result != CUresult::CUDA_SUCCESS {
        panic!("{call} failed on the GPU: {}", name_of(result));
    }
}

fn name_of(result: CUresult) -> String {
    let mut name: *const c_char = null();
    // SAFETY: writes a pointer to a static string.
    unsafe { cu::cuGetErrorName(result, &mut name) };
    if name.is_null() {
        return format!("error {}", result as u32);
    }
    // SAFETY: the driver's strings are static and end in a zero.
    unsafe { CStr::from_ptr(name) }.to_string_lossy().into_owned()
}

fn missing(what: impl Into<String>, remedy: &str) -> NoGpu {
    NoGpu { what: what.into(), remedy: remedy.into() }
}

const LIBRARIES: &str = "install CUDA 12 or 13 (or `pip install nvidia-cuda-nvrtc nvidia-cublas`) and put the folders of its libraries into LD_LIBRARY_PATH";

/// GPUs the driver shows.
fn shown() -> usize {
    let mut count = 0;
    // SAFETY: writes a number.
    let asked = unsafe { cu::cuDeviceGetCount(&mut count) };
    if asked == CUresult::CUDA_SUCCESS { count as usize } else { 0 }
}

/// Looks for everything a GPU needs, and opens none: how many the driver shows.
pub(super) fn find() -> Result<usize, NoGpu> {
    // SAFETY: looks for a library and does nothing else.
    if !unsafe { cu::is_culib_present() } {
        return Err(missing(
            "libcuda.so is not on this machine",
            "install NVIDIA's driver, or compute on the CPU",
        ));
    }
    if !nvrtc::has_compiler() {
        return Err(missing("NVRTC, which compiles the kernels, was not found (libnvrtc.so)", LIBRARIES));
    }
    Lt::find().map_err(|what| missing(what, LIBRARIES))?;
    // SAFETY: the first call to the driver.
    let begun = unsafe { cu::cuInit(0) };
    if begun != CUresult::CUDA_SUCCESS {
        return Err(missing(
            format!("the driver says {}", name_of(begun)),
            "look at `nvidia-smi`; is a GPU given to this machine or container?",
        ));
    }
    match shown() {
        0 => Err(missing("the driver shows none", "look at `nvidia-smi` and at CUDA_VISIBLE_DEVICES")),
        cards => Ok(cards),
    }
}

impl Real {
    /// The GPU of the `seat`-th of several processes.
    pub fn of(seat: usize) -> Result<Real, NoGpu> {
        let cards = find()?;
        let which = super::turn(seat, cards);
        let (mut device, mut context) = (0, null_mut());
        // SAFETY: writes two handles; the primary context lives as long as the process.
        let found = unsafe {
            match cu::cuDeviceGet(&mut device, which as c_int) {
                CUresult::CUDA_SUCCESS => cu::cuDevicePrimaryCtxRetain(&mut context, device),
                failed => failed,
            }
        };
        if found != CUresult::CUDA_SUCCESS {
            return Err(missing(
                format!("GPU {which} of {cards} cannot be opened: {}", name_of(found)),
                "look at `nvidia-smi` and at CUDA_VISIBLE_DEVICES",
            ));
        }
        // SAFETY: a context of ours.
        check(unsafe { cu::cuCtxSetCurrent(context) }, "cuCtxSetCurrent");
        BOUND.set(true);
        let lt = Lt::new().map_err(|what| missing(what, LIBRARIES))?;
        let streams = [(); 3].map(|()| new_stream());
        let mut workspace = 0;
        // SAFETY: writes an address.
        check(unsafe { cu::cuMemAlloc_v2(&mut workspace, PRODUCT_BYTES) }, "cuMemAlloc");
        let card = card_of(device);
        let (loaded, events, peers) = (Mutex::default(), Mutex::default(), Mutex::default());
        Ok(Real { context, streams, peers, card, device, loaded, lt, workspace, events })
    }

    /// The context on this thread.
    fn bind(&self) {
        if !BOUND.replace(true) {
            // SAFETY: a context that lives as long as the process.
            check(unsafe { cu::cuCtxSetCurrent(self.context) }, "cuCtxSetCurrent");
        }
    }

    fn stream(&self, stream: Stream) -> cu::CUstream {
        self.bind();
        match stream {
            Stream::Compute => self.streams[0],
            Stream::Up => self.streams[1],
            Stream::Down => self.streams[2],
            Stream::Peers(number) => lock(&self.peers).entry(number).or_insert_with(|| Peer(new_stream())).0,
        }
    }

    fn function(&self, kernel: &Kernel<'_>) -> cu::CUfunction {
        let mut loaded = lock(&self.loaded);
        if let Some(Function(function, shared)) = loaded.functions.get(kernel.name)
            && *shared >= kernel.shared_bytes
        {
            return *function;
        }
        let name = CString::new(kernel.name).expect("a name without zeros");
        let mut function = null_mut();
        let mut is_in = |module: &cu::CUmodule| {
            // SAFETY: a loaded module and a name that ends in a zero.
            unsafe {
                cu::cuModuleGetFunction(&mut function, *module, name.as_ptr()) == CUresult::CUDA_SUCCESS
            }
        };
        assert!(loaded.modules.iter().any(&mut is_in), "no kernel {} was loaded", kernel.name);
        const FREE_SHARED_BYTES: u32 = 48 << 10;
        if kernel.shared_bytes > FREE_SHARED_BYTES {
            let most = cu::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: a function of the module.
            let set = unsafe { cu::cuFuncSetAttribute(function, most, kernel.shared_bytes as i32) };
            check(set, kernel.name);
        }
        let shared = kernel.shared_bytes.max(FREE_SHARED_BYTES);
        loaded.functions.insert(kernel.name.into(), Function(function, shared));
        function
    }

    fn location(&self) -> cu::CUmemLocation {
        cu::CUmemLocation { type_: cu::CUmemLocationType::CU_MEM_LOCATION_TYPE_DEVICE, id: self.device }
    }

    fn frame_kind(&self) -> cu::CUmemAllocationProp {
        // SAFETY: plain numbers and a pointer, all of which may be zero.
        let mut kind: cu::CUmemAllocationProp = unsafe { std::mem::zeroed() };
        kind.type_ = cu::CUmemAllocationType::CU_MEM_ALLOCATION_TYPE_PINNED;
        kind.location = self.location();
        kind
    }
}

fn new_stream() -> cu::CUstream {
    let mut stream = null_mut();
    let flags = cu::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
    // SAFETY: writes a handle.
    check(unsafe { cu::cuStreamCreate(&mut stream, flags) }, "cuStreamCreate");
    stream
}

fn attribute(device: cu::CUdevice, which: cu::CUdevice_attribute) -> u32 {
    let mut value: c_int = 0;
    // SAFETY: writes a number.
    check(unsafe { cu::cuDeviceGetAttribute(&mut value, which, device) }, "cuDeviceGetAttribute");
    value as u32
}

fn card_of(device: cu::CUdevice) -> Card {
    use cu::CUdevice_attribute as Which;
    let mut name = [0 as c_char; 128];
    // SAFETY: writes at most as many characters, the last a zero.
    check(unsafe { cu::cuDeviceGetName(name.as_mut_ptr(), 128, device) }, "cuDeviceGetName");
    let (mut bytes, mut version) = (0usize, 0);
    // SAFETY: writes two numbers.
    unsafe {
        check(cu::cuDeviceTotalMem_v2(&mut bytes, device), "cuDeviceTotalMem");
        check(cu::cuDriverGetVersion(&mut version), "cuDriverGetVersion");
    }
    let major = attribute(device, Which::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR);
    let minor = attribute(device, Which::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR);
    Card {
        // SAFETY: the driver ended it in a zero.
        name: unsafe { CStr::from_ptr(name.as_ptr()) }.to_string_lossy().into_owned(),
        memory_bytes: bytes,
        capability: (major, minor),
        multiprocessors: attribute(device, Which::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT),
        driver: ((version / 1000) as u32, (version % 1000 / 10) as u32),
        shown: shown(),
    }
}

impl Driver for Real {
    fn card(&self) -> Card {
        self.card.clone()
    }

    fn uuid(&self) -> [u8; 16] {
        self.bind();
        let mut uuid = cu::CUuuid { bytes: [0; 16] };
        // SAFETY: writes sixteen bytes.
        check(unsafe { cu::cuDeviceGetUuid_v2(&mut uuid, self.device) }, "cuDeviceGetUuid");
        uuid.bytes.map(|byte| byte as u8)
    }

    fn free_bytes(&self) -> usize {
        self.bind();
        let (mut free, mut all) = (0, 0);
        // SAFETY: writes two numbers.
        check(unsafe { cu::cuMemGetInfo_v2(&mut free, &mut all) }, "cuMemGetInfo");
        free
    }

    fn allocate(&self, bytes: usize) -> Option<Address> {
        self.bind();
        let mut at = 0;
        // SAFETY: writes an address.
        match unsafe { cu::cuMemAlloc_v2(&mut at, bytes.max(1)) } {
            CUresult::CUDA_ERROR_OUT_OF_MEMORY => None,
            result => {
                check(result, "cuMemAlloc");
                Some(at)
            }
        }
    }

    fn release(&self, at: Address) {
        self.bind();
        // SAFETY: an address `allocate` gave; the driver waits for what uses it.
        check(unsafe { cu::cuMemFree_v2(at) }, "cuMemFree");
    }

    fn reserve(&self, bytes: usize) -> Option<Address> {
        self.bind();
        let mut at = 0;
        // SAFETY: writes an address.
        match unsafe { cu::cuMemAddressReserve(&mut at, bytes, 0, 0, 0) } {
            CUresult::CUDA_ERROR_OUT_OF_MEMORY => None,
            result => {
                check(result, "cuMemAddressReserve");
                Some(at)
            }
        }
    }

    fn unreserve(&self, at: Address, bytes: usize) {
        self.bind();
        // SAFETY: what `reserve` gave, mapped nowhere by contract.
        check(unsafe { cu::cuMemAddressFree(at, bytes) }, "cuMemAddressFree");
    }

    fn granularity(&self) -> usize {
        self.bind();
        let mut bytes = 0;
        let least = cu::CUmemAllocationGranularity_flags::CU_MEM_ALLOC_GRANULARITY_MINIMUM;
        // SAFETY: reads a description, writes a number.
        let got = unsafe { cu::cuMemGetAllocationGranularity(&mut bytes, &self.frame_kind(), least) };
        check(got, "cuMemGetAllocationGranularity");
        bytes
    }

    fn create(&self, bytes: usize) -> Option<Frame> {
        self.bind();
        let mut handle = 0;
        // SAFETY: reads a description, writes a handle.
        match unsafe { cu::cuMemCreate(&mut handle, bytes, &self.frame_kind(), 0) } {
            CUresult::CUDA_ERROR_OUT_OF_MEMORY => None,
            result => {
                check(result, "cuMemCreate");
                Some(Frame(handle))
            }
        }
    }

    fn destroy(&self, frame: Frame) {
        self.bind();
        // SAFETY: a handle `create` gave, mapped nowhere by contract.
        check(unsafe { cu::cuMemRelease(frame.0) }, "cuMemRelease");
    }

    fn map(&self, at: Address, frame: Frame, bytes: usize) {
        self.bind();
        let flags = cu::CUmemAccess_flags::CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
        let access = cu::CUmemAccessDesc { location: self.location(), flags };
        // SAFETY: reserved addresses with nothing behind them, and a frame of as many bytes.
        unsafe {
            check(cu::cuMemMap(at, bytes, 0, frame.0, 0), "cuMemMap");
            check(cu::cuMemSetAccess(at, bytes, &access, 1), "cuMemSetAccess");
        }
    }

    fn unmap(&self, at: Address, bytes: usize) {
        self.bind();
        // SAFETY: mapped addresses that nothing uses any more, by contract.
        check(unsafe { cu::cuMemUnmap(at, bytes) }, "cuMemUnmap");
    }

    unsafe fn copy_up(&self, stream: Stream, to: Address, from: *const u8, bytes: usize) {
        let stream = self.stream(stream);
        // SAFETY: the caller's promise; of memory that is not pinned the driver has a copy when it returns,
        // and pinned memory is waited for by who gave it.
        check(unsafe { cu::cuMemcpyHtoDAsync_v2(to, from.cast(), bytes, stream) }, "cuMemcpyHtoD");
    }

    unsafe fn copy_down(&self, stream: Stream, to: *mut u8, from: Address, bytes: usize) {
        let stream = self.stream(stream);
        // SAFETY: the caller's promise.
        check(unsafe { cu::cuMemcpyDtoHAsync_v2(to.cast(), from, bytes, stream) }, "cuMemcpyDtoH");
    }

    unsafe fn copy_within(&self, stream: Stream, to: Address, from: Address, bytes: usize) {
        let stream = self.stream(stream);
        // SAFETY: the caller's promise.
        check(unsafe { cu::cuMemcpyDtoDAsync_v2(to, from, bytes, stream) }, "cuMemcpyDtoD");
    }

    unsafe fn fill(&self, stream: Stream, at: Address, byte: u8, bytes: usize) {
        let stream = self.stream(stream);
        // SAFETY: the caller's promise.
        check(unsafe { cu::cuMemsetD8Async(at, byte, bytes, stream) }, "cuMemset");
    }

    unsafe fn pin(&self, at: *mut u8, bytes: usize) -> bool {
        self.bind();
        // SAFETY: the caller's memory, which stays.
        unsafe { cu::cuMemHostRegister_v2(at.cast(), bytes, 0) == CUresult::CUDA_SUCCESS }
    }

    unsafe fn unpin(&self, at: *mut u8) {
        self.bind();
        // SAFETY: pinned before, by contract.
        check(unsafe { cu::cuMemHostUnregister(at.cast()) }, "cuMemHostUnregister");
    }

    fn handle(&self, stream: Stream) -> *mut c_void {
        self.stream(stream).cast()
    }

    fn wait(&self, stream: Stream) {
        let stream = self.stream(stream);
        // SAFETY: a stream of ours.
        check(unsafe { cu::cuStreamSynchronize(stream) }, "the work before");
    }

    fn mark(&self, stream: Stream) -> Mark {
        let stream = self.stream(stream);
        let event = lock(&self.events).pop().unwrap_or_else(|| {
            let mut event = null_mut();
            let flags = cu::CUevent_flags::CU_EVENT_DISABLE_TIMING as u32;
            // SAFETY: writes a handle.
            check(unsafe { cu::cuEventCreate(&mut event, flags) }, "cuEventCreate");
            Mark(NonZeroU64::new(event as u64).expect("the driver made an event"))
        });
        // SAFETY: an event and a stream of ours.
        check(unsafe { cu::cuEventRecord(event.0.get() as cu::CUevent, stream) }, "cuEventRecord");
        event
    }

    fn is_done(&self, mark: Mark) -> bool {
        self.bind();
        // SAFETY: an event of ours.
        match unsafe { cu::cuEventQuery(mark.0.get() as cu::CUevent) } {
            CUresult::CUDA_ERROR_NOT_READY => false,
            result => {
                check(result, "the work before");
                true
            }
        }
    }

    fn follow(&self, stream: Stream, mark: Mark) {
        let stream = self.stream(stream);
        // SAFETY: a stream and an event of ours.
        check(unsafe { cu::cuStreamWaitEvent(stream, mark.0.get() as cu::CUevent, 0) }, "cuStreamWaitEvent");
        // The wait is for what the event says now; it may be recorded anew.
        lock(&self.events).push(mark);
    }

    fn forget(&self, mark: Mark) {
        lock(&self.events).push(mark);
    }

    fn wait_for(&self, mark: Mark) {
        self.bind();
        // SAFETY: an event of ours.
        check(unsafe { cu::cuEventSynchronize(mark.0.get() as cu::CUevent) }, "the work before");
        lock(&self.events).push(mark);
    }

    fn load(&self, program: &Program<'_>, kept: Option<&Path>) -> Result<(), String> {
        self.bind();
        let (major, minor) = self.card.capability;
        let images = nvrtc::compile_all(program, &format!("sm_{major}{minor}"), kept)?;
        for image in images {
            let mut module = null_mut();
            // SAFETY: an image the compiler made for this card.
            let loaded = unsafe { cu::cuModuleLoadData(&mut module, image.as_ptr().cast()) };
            if loaded != CUresult::CUDA_SUCCESS {
                let folder = kept.map_or(String::new(), |kept| format!("; empty {}", kept.display()));
                return Err(format!("the driver refuses the kernels: {}{folder}", name_of(loaded)));
            }
            lock(&self.loaded).modules.push(module);
        }
        Ok(())
    }

    unsafe fn launch(&self, stream: Stream, kernel: &Kernel<'_>, arguments: &mut [*mut c_void]) {
        let stream = self.stream(stream);
        let function = self.function(kernel);
        let ([x, y, z], [tx, ty, tz]) = (kernel.grid, kernel.threads);
        let arguments = arguments.as_mut_ptr();
        // SAFETY: a function of the loaded module, with the arguments the caller promises.
        let launched = unsafe {
            cu::cuLaunchKernel(
                function,
                x,
                y,
                z,
                tx,
                ty,
                tz,
                kernel.shared_bytes,
                stream,
                arguments,
                null_mut(),
            )
        };
        check(launched, kernel.name);
    }

    unsafe fn matmul(&self, product: &Matmul) {
        let stream = self.stream(Stream::Compute);
        // SAFETY: the caller's promise; the workspace is used by products alone, which run in order.
        unsafe { self.lt.matmul(product, (self.workspace, PRODUCT_BYTES), stream.cast()) };
    }
}
