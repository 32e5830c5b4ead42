//! Named tensors in a safetensors file: eight bytes of header length, a JSON header, the elements.

use super::bad;
use crate::device::Lane;
use crate::error::{Error, Result};
use crate::tensor::{DType, Shape, Tensor};
use memmap2::Mmap;
use safetensors::tensor::{Dtype, Metadata, TensorInfo};
use safetensors::{SafeTensorError, SafeTensors};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs::File;
use std::path::{Path, PathBuf};

// The format is little-endian, and elements are copied as they lie in memory.
const _: () = assert!(cfg!(target_endian = "little"));

/// The bytes of a header are filled up to a multiple of this, so that the elements are aligned.
const ALIGN: usize = 8;

fn to_disk(dtype: DType) -> Dtype {
    match dtype {
        DType::F64 => Dtype::F64,
        DType::F32 => Dtype::F32,
        DType::BF16 => Dtype::BF16,
        DType::F16 => Dtype::F16,
        DType::I32 => Dtype::I32,
    }
}

fn from_disk(dtype: Dtype) -> Option<DType> {
    [DType::F64, DType::F32, DType::BF16, DType::F16, DType::I32].into_iter().find(|d| to_disk(*d) == dtype)
}

/// A tensor as a whole, whoever holds what of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Whole {
    /// Its name.
    pub name: String,
    /// Its type.
    pub dtype: DType,
    /// Its shape.
    pub shape: Shape,
}

impl Whole {
    /// Of tensors that are so already.
    pub fn of(tensors: &[(String, Tensor)]) -> Vec<Whole> {
        let whole = |(name, t): &(String, Tensor)| Whole { name: name.clone(), dtype: t.dtype(), shape: *t.shape() };
        tensors.iter().map(whole).collect()
    }
}

/// The order in which `tensors` are written: wide elements first, so that all are aligned.
pub fn write_order(tensors: &[Whole]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..tensors.len()).collect();
    let key = |i: &usize| (std::cmp::Reverse(tensors[*i].dtype.size()), tensors[*i].name.as_str());
    order.sort_by(|a, b| key(a).cmp(&key(b)));
    order
}

/// Writes `tensors` of `lane`'s device to the file `path`, atomically; one at a time is copied to the host.
///
/// # Errors
/// If two have one name, the file cannot be written, or the device fails. The file is then as it was before.
pub fn write_tensors(path: &Path, lane: &Lane, tensors: &[(String, Tensor)]) -> Result<()> {
    write_wholes(path, &Whole::of(tensors), &mut |i| lane.to_host(&tensors[i].1))
}

/// Writes `tensors` to the file `path`, atomically. `whole` gives the i-th, in host memory, when it is its turn
/// ([`write_order`]), and it is let go of before the next.
///
/// # Errors
/// As [`write_tensors`], and those of `whole`.
pub fn write_wholes(path: &Path, tensors: &[Whole], whole: &mut dyn FnMut(usize) -> Result<Tensor>) -> Result<()> {
    write_divided(path, tensors, |tensor| vec![(tensor.name.clone(), tensor.shape)], whole)
}

/// [`write_wholes`], where the file has each tensor under the names and shapes that `divide` gives: consecutive parts of it.
pub(super) fn write_divided(
    path: &Path,
    tensors: &[Whole],
    divide: impl Fn(&Whole) -> Vec<(String, Shape)>,
    whole: &mut dyn FnMut(usize) -> Result<Tensor>,
) -> Result<()> {
    let order = write_order(tensors);
    let (mut names, mut infos, mut end) = (HashSet::new(), Vec::new(), 0);
    for &i in &order {
        let dtype = tensors[i].dtype;
        for (name, shape) in divide(&tensors[i]) {
            if !names.insert(name.clone()) {
                return Err(bad(path, format!("two tensors are named {name}")));
            }
            let start = end;
            end += shape.elements() * dtype.size();
            let info = TensorInfo { dtype: to_disk(dtype), shape: shape.to_vec(), data_offsets: (start, end) };
            infos.push((name, info));
        }
    }
    let invalid = |e: &dyn std::fmt::Display| bad(path, format!("no header for these tensors: {e}"));
    // transformers refuses files that do not name the framework whose layout they follow.
    let format = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    let header = Metadata::new(Some(format), infos).map_err(|e| invalid(&e))?;
    let mut header = serde_json::to_vec(&header).map_err(|e| invalid(&e))?;
    header.resize(header.len().next_multiple_of(ALIGN), b' ');

    crate::fsio::atomic_write(path, |out| {
        let mut put = |bytes: &[u8]| out.write_all(bytes).map_err(|e| Error::io(path, e));
        put(&(header.len() as u64).to_le_bytes())?;
        put(&header)?;
        order.into_iter().try_for_each(|i| {
            let host = whole(i)?;
            if (*host.shape(), host.dtype()) != (tensors[i].shape, tensors[i].dtype) {
                let Whole { name, dtype, shape } = &tensors[i];
                return Err(bad(path, format!("{} {} for {name}: {dtype} {shape}", host.dtype(), host.shape())));
            }
            put(bytes(&host))
        })
    })
}

/// The elements of a fresh row-major host tensor.
fn bytes(host: &Tensor) -> &[u8] {
    // SAFETY: the writer was given a row-major tensor of its own in host memory, which no operation writes any more.
    unsafe { std::slice::from_raw_parts(host.ptr(), host.elements() * host.dtype().size()) }
}

/// The file among `files` that holds each of `targets`, which together they hold exactly.
///
/// # Errors
/// If one is missing (then `listing` is named, the file that says which files there are), twice there, of another shape, or
/// not of floats where the target is, or if there are others.
pub(super) fn locate<'a>(listing: &Path, files: &'a [TensorFile], targets: &[Whole]) -> Result<Vec<&'a TensorFile>> {
    let mut found: BTreeMap<&str, &TensorFile> = BTreeMap::new();
    for file in files {
        for name in file.names() {
            if let Some(first) = found.insert(name, file) {
                return Err(bad(&file.path, format!("tensor {name} is in {} as well", first.path.display())));
            }
        }
    }
    let mut holders = Vec::with_capacity(targets.len());
    for Whole { name, dtype: wanted, shape: full } in targets {
        let Some(file) = found.remove(name.as_str()) else {
            return Err(bad(listing, format!("tensor {name} of shape {full} is missing")));
        };
        let (dtype, shape) = file.info(name)?;
        if shape != *full || dtype.is_float() != wanted.is_float() {
            let reason = format!("tensor {name} is {dtype} {shape}, expected {wanted} {full}");
            return Err(bad(&file.path, reason));
        }
        holders.push(file);
    }
    if !found.is_empty() {
        let names: Vec<&str> = found.keys().take(8).copied().collect();
        let more = if found.len() > names.len() { ", …" } else { "" };
        return Err(bad(listing, format!("{} tensors that are not expected: {}{more}", found.len(), names.join(", "))));
    }
    Ok(holders)
}

/// A safetensors file, mapped and not read until asked for.
pub struct TensorFile {
    path: PathBuf,
    map: Mmap,
    header: Metadata,
    names: Vec<String>,
    /// Where the elements begin.
    start: usize,
}

impl TensorFile {
    /// Maps a file and checks its header against its length.
    ///
    /// # Errors
    /// If there is none, it cannot be read, it is cut off, or it is not of this format.
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(|e| Error::io(path, e))?;
        // SAFETY: files are replaced by a rename, never written in place, so the mapped bytes do not change; a reader must
        // not truncate them in the meantime.
        let map = unsafe { Mmap::map(&file) }.map_err(|e| Error::io(path, e))?;
        let (length, header) = SafeTensors::read_metadata(&map).map_err(|e| bad(path, describe(&e, map.len())))?;
        let names = header.offset_keys();
        Ok(TensorFile { path: path.to_path_buf(), start: size_of::<u64>() + length, map, header, names })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The tensors' names, in the file's order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.names.iter().map(String::as_str)
    }

    /// What the file says about itself, by name.
    pub fn metadata(&self) -> HashMap<String, String> {
        self.header.metadata().clone().unwrap_or_default()
    }

    /// A tensor's type and shape.
    ///
    /// # Errors
    /// If there is no such tensor, or it is of a type or rank that no tensor here has.
    pub fn info(&self, name: &str) -> Result<(DType, Shape)> {
        let (info, dtype) = self.find(name)?;
        Ok((dtype, Shape::new(&info.shape)))
    }

    /// A copy of a tensor in host memory, of the type it has on disk.
    ///
    /// # Errors
    /// As [`TensorFile::info`].
    pub fn read(&self, name: &str) -> Result<Tensor> {
        let (info, dtype) = self.find(name)?;
        let out = Tensor::host(Shape::new(&info.shape), dtype);
        let (from, to) = info.data_offsets;
        let data = &self.map[self.start + from..self.start + to];
        // SAFETY: `out` is new host memory of as many bytes: the header's offsets were checked against shape and type.
        unsafe { std::ptr::copy_nonoverlapping(data.as_ptr(), out.ptr(), data.len()) };
        Ok(out)
    }

    /// Fails unless the file holds exactly `targets`, by name and shape; float types may differ.
    ///
    /// # Errors
    /// Names the tensor and what is wrong with it.
    pub fn check(&self, targets: &[Whole]) -> Result<()> {
        locate(&self.path, std::slice::from_ref(self), targets).map(drop)
    }

    /// Writes the tensors of `targets`, which [`TensorFile::check`] has found to fit, converted to their types.
    ///
    /// # Errors
    /// As [`TensorFile::read`], and if the device fails.
    pub fn read_into(&self, lane: &Lane, targets: &[(String, Tensor)]) -> Result<()> {
        targets.iter().try_for_each(|(name, target)| lane.copy(&lane.to_device(&self.read(name)?)?, target))
    }

    fn find(&self, name: &str) -> Result<(&TensorInfo, DType)> {
        let Some(info) = self.header.info(name) else {
            return Err(bad(&self.path, format!("tensor {name} is missing")));
        };
        if info.shape.len() > crate::tensor::MAX_RANK {
            let (rank, max) = (info.shape.len(), crate::tensor::MAX_RANK);
            return Err(bad(&self.path, format!("tensor {name} has {rank} dimensions: at most {max}")));
        }
        match from_disk(info.dtype) {
            Some(dtype) => Ok((info, dtype)),
            None => Err(bad(&self.path, format!("tensor {name} is {}: f64, f32, bf16, f16 or i32", info.dtype))),
        }
    }
}

/// What is wrong with a file of `length` bytes.
fn describe(error: &SafeTensorError, length: usize) -> String {
    match error {
        SafeTensorError::MetadataIncompleteBuffer => {
            format!("truncated, or no safetensors file: its {length} bytes are not as many as its header describes")
        }
        SafeTensorError::HeaderTooSmall | SafeTensorError::InvalidHeaderLength => {
            format!("truncated, or no safetensors file: its {length} bytes do not hold the header they announce")
        }
        _ => format!("no safetensors file: {error}"),
    }
}
