// Distances on the picture: a line in image coordinates (columns and rows, fractional), its length in millimetres.

export function lengthOf(line, { row_mm, column_mm }) {
  return Math.hypot((line.x2 - line.x1) * column_mm, (line.y2 - line.y1) * row_mm);
}

// `s` places the image on the canvas: pixels of the canvas for a column and a row, and its upper left corner.
export function drawMeasure(context, line, s, plane) {
  const { canvas } = context;
  const [x1, y1, x2, y2] = [s.left + line.x1 * s.x, s.top + line.y1 * s.y, s.left + line.x2 * s.x, s.top + line.y2 * s.y];
  const ratio = devicePixelRatio;
  context.strokeStyle = context.fillStyle = "#ffe27a";
  context.lineWidth = 1.5 * ratio;
  context.beginPath();
  context.moveTo(x1, y1);
  context.lineTo(x2, y2);
  context.stroke();
  const label = `${lengthOf(line, plane).toFixed(1)} mm`;
  context.font = `${14 * ratio}px system-ui, sans-serif`;
  const [width, height] = [context.measureText(label).width + 8 * ratio, 19 * ratio];
  const left = Math.max(0, Math.min(x2 + 6 * ratio, canvas.width - width)); // a label at the edge is not cut
  const top = Math.max(0, Math.min(y2 - 20 * ratio, canvas.height - height));
  context.fillStyle = "rgb(0 0 0 / 75%)";
  context.fillRect(left, top, width, height);
  context.fillStyle = "#ffe27a";
  context.fillText(label, left + 4 * ratio, top + 14 * ratio);
}
