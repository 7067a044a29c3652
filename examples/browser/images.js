// Images as the networks see them.

export async function decode(blob) {
  return createImageBitmap(blob, {colorSpaceConversion: 'none'});
}

/** Draws the middle square of an image, as large as the networks want it; the pixels, -1 to 1. */
export function draw(context, source, size) {
  const side = Math.min(source.width, source.height);
  context.fillStyle = 'white'; // below what is transparent
  context.fillRect(0, 0, size, size);
  context.imageSmoothingQuality = 'high';
  const [left, top] = [(source.width - side) / 2, (source.height - side) / 2];
  context.drawImage(source, left, top, side, side, 0, 0, size, size);
  const {data} = context.getImageData(0, 0, size, size);
  return Float32Array.from({length: 3 * size * size}, (_, i) => {
    return data[4 * Math.floor(i / 3) + (i % 3)] / 127.5 - 1;
  });
}
